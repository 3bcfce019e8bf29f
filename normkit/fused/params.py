"""The ctypes counterpart of LayerParams in csrc/layer_params.h."""

import ctypes

CONV_NORM_RELU, CONV1X1_MAXPOOL, AVGPOOL_LINEAR = range(3)

_INTS = (
    "kind skip_source N C K H W num_groups nchw use_running_stats accumulate_dx weight_c_stride weight_tap_stride"
).split()
_DOUBLES = "eps momentum".split()
_POINTERS = (
    "x skip saved out weight bias norm_weight norm_bias dropout_scale mean var running_mean running_var "
    "dout dx dpre_activation dweight dbias dnorm_weight dnorm_bias"
).split()


class LayerParams(ctypes.Structure):
    """Sizes and addresses of one layer. saved is the union of pre_activation, argmax and pooled."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in _INTS]
        + [(name, ctypes.c_double) for name in _DOUBLES]
        + [(name, ctypes.c_void_p) for name in _POINTERS]
    )
