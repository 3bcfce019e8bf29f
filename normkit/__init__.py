"""The package behind the notebook and utils.py.

data         Data, a data set in memory, and the checks of it; train_val_split
cifar10      load_data: finds, fetches, verifies, unpacks, reads and caches CIFAR-10
synthetic    make_synthetic, the built-in stand-in for CIFAR-10
augment      every way to shift and flip an image
files        files of tensors and plain values, written atomically
checks       the errors for bad input, in training and elsewhere
checksum     checksums of arrays
checkpoint   Checkpoint: the whole state of a run, so that it resumes as if it had never stopped
resume       TrainingState: what is set back where an epoch fails, and kept in a checkpoint
identity     what identifies a run, as text: settings, code and data
code         marks of code, and of objects by what they are made of
network      marks of the network, norms and functions as loaded, by which checkpoints and studies notice edits
randomness   seeds, the global generators, and the states of generators of any kind
stateful     finds and keeps what has a state in loaders and callbacks
objects      user-defined objects and functions, and their attributes
packing      packs values into what a file can keep, and unpacks them, kind and all
attributes   saves attributes of user-defined objects that change during training
optim        checks of users' optimizers and schedulers; their hooks and gradients
stepper      Stepper: optimizer steps, by the fastest path that gives the same numbers
muon         Muon, all its matrices orthogonalised together
device       device, precision, memory format, and the self-check of norms
placement    on Macs, whether the GPU or the CPU trains a network faster
backend      what computes a network: its modules, the fused kernel, CUDA graphs, or torch.compile
graph        Graphed: training steps as CUDA graphs, one launch each
fused        fuse(): the kernel for CPUs; see fused/README.md
gpu          Triton kernels for the layers, and the GPU training step built from them
meter        Meter, Metrics: loss and accuracy, accumulated over a loader
progress     progress bars
environment  check_setup: reports versions, device, kernel and data, and what is missing
engine       compute: many tasks on joblib's active backend: processes, dask or Ray
rows         the file of a study: read and checked, and added to
study        grid, run_many: many runs into one file
tables       tables of one run and of many
style        colours and style of all pictures
text         the text in pictures, made to fit
figure       Picture, the figure that pictures are drawn in
predictions  checks of the logits that pictures are given
copies       unwrapped copies of networks, for inspection
plots        curves, samples, mistakes, confusions, pictures of studies
anatomy      pictures and tables of what norms and networks do
norms        more norms to compare the three with, each for one line in model.NORMS
probes       gradients, similarity of activations and range of the loss, measured in training
robustness   calibration, and accuracy on corrupted images
exercises    checks of the notebook's exercises

Imports run one way: only study imports utils; only study, network and fused import model. plots and tables take
histories and tensors.
"""
