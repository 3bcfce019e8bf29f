"""The package behind the notebook and utils.py.

data         Data, a data set in memory, and the checks of it; train_val_split
cifar10      load_data: finds, fetches, verifies, unpacks, reads and caches CIFAR-10
synthetic    make_synthetic, the built-in stand-in for CIFAR-10
augment      every way to shift and flip an image
files        files of tensors and plain values, written atomically
checks       the errors for bad input, in training and elsewhere
checksum     checksums of arrays
checkpoint   Checkpoint: all that a run needs to go on as if it had never stopped
identity     what tells a run from another one, as text
code         marks of code, and of objects by what they are made of
randomness   seeds, the global generators, and the states of generators of any kind
stateful     finds and keeps what has a state in loaders and callbacks
objects      user-defined objects and functions, and their attributes
packing      packs values into what a file can keep, and unpacks them, kind and all
attributes   what moves, while training goes on, in user-defined objects
optim        what the loop has to know of optimizers and schedulers that are not its own
stepper      Stepper: the steps of an optimizer, in the fastest of the ways to the same numbers
muon         Muon, all its matrices orthogonalised together
device       device, precision, memory format, and the self-check of norms
placement    on Macs, whether the GPU or the CPU trains a network faster
backend      what computes a network: its modules, the fused kernel, CUDA graphs, or torch.compile
graph        Graphed: on a GPU, training steps that are started in one call
fused        fuse(): the kernel for CPUs; see fused/README.md
gpu          Triton kernels for training steps on a GPU, and the step that they make up
meter        Meter, Metrics: what a pass over a loader adds up to
progress     progress bars
environment  check_setup: what the kit runs on, and what is missing
engine       compute: many tasks on whatever joblib is set to, a dask cluster too
network      marks of norms and of the network, by which a study tells edited ones apart
rows         the file of a study: read and checked, and added to
study        grid, run_many: many runs into one file
tables       tables of one run and of many
style        colours and style of all pictures
text         the text in pictures, made to fit
figure       Picture, the figure that pictures are drawn in
predictions  checks of the logits that pictures are given
copies       copies of networks to look at, out of their wrappers
plots        curves, samples, mistakes, confusions, pictures of studies
anatomy      pictures and tables of what norms and networks do
norms        more norms to compare the three with, each for one line in model.NORMS
probes       gradients, similarity of activations and range of the loss, measured in training
robustness   calibration, and accuracy on corrupted images
exercises    checks of the notebook's exercises

Imports run one way: plots and tables know histories and tensors, study stands on top of utils, nothing else here knows
model or utils but network and fused, which know the network.
"""
