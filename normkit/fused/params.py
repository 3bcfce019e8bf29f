"""The counterpart of LayerParams in csrc/layer_params.h: its fields, and arrays of such structs."""

import ctypes

import numpy as np

CONV_NORM_RELU, CONV1X1_MAXPOOL, AVGPOOL_LINEAR = range(3)

_INTS = (
    "kind skip_source N C K H W num_groups nchw use_running_stats accumulate_dx weight_c_stride weight_tap_stride"
).split()
_DOUBLES = "eps momentum".split()
_POINTERS = (
    "x weight bias norm_weight norm_bias dropout_scale running_mean running_var out "
    "dout dx dweight dbias dnorm_weight dnorm_bias "
    "source skip saved map_mean map_var mean rstd scale shift dscale dshift dpre_activation "
    "packed packed_backward grads"
).split()


class LayerParams(ctypes.Structure):
    """Sizes and addresses of one layer; from source on, C++ fills them in. saved: pre_activation, argmax or pooled."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in _INTS]
        + [(name, ctypes.c_double) for name in _DOUBLES]
        + [(name, ctypes.c_void_p) for name in _POINTERS]
    )


FIELDS = {name: place for place, (name, _) in enumerate(LayerParams._fields_)}  # of eight bytes each


def make_structs(sizes):
    """Returns an int64 array (layers, fields), one LayerParams a row, from each layer's values of the first fields."""
    structs = np.zeros((len(sizes), len(FIELDS)), np.int64)
    for row, values in zip(structs, sizes):
        row[: len(_INTS)] = values[: len(_INTS)]
        row.view(np.float64)[len(_INTS) : len(values)] = values[len(_INTS) :]
    return structs


def offsets_of(fields, layers):
    """Returns where in such an array of so many layers, taken as flat, given (layer, field name) pairs lie."""
    return np.array([layer % layers * len(FIELDS) + FIELDS[name] for layer, name in fields], np.intp)


def set_addresses(structs, places, tensors):
    """Writes the tensors' addresses to those places; 0 for None."""
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    if 0 in addresses and any(not address and tensor is not None for address, tensor in zip(addresses, tensors)):
        raise RuntimeError(
            "the memory of the images or of a parameter was given back: they have no values to compute with"
        )
    structs.reshape(-1)[places] = addresses
