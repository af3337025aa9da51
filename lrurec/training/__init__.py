"""From a log of clicks to a bundle.

command        `lrurec train`, with progress on the terminal
train          the whole way: split, steps, validations, checkpoints, bundle
run            a training between two steps: weights, optimizer, the best so far; saved and resumed
presets        every setting, and what is known to work on which data
windows        histories → batches of packed tokens, no padding between them
cooccurrence   item embeddings to start from
loss           the full softmax and its gradient, a tile of scores at a time
checkpoint     a training that was broken off, as a file
only_one       one training of a bundle at a time
memory         freed memory goes back to the system

Nothing is imported here: `lrurec --help` reads the presets, and doesn't wait for torch.
"""
