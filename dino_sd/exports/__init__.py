"""The formats of an export, one file each; the file's name is the format's. Each has

TOLERANCE: how far outputs may be off when reloaded, absolute, float32.
GRAPH: whether the file holds a graph: `dynamic_size` and `preprocess` are for these alone.
refuse(exported): raises UserError for a network that the format cannot hold.
write(folder, exported): writes its files; config.json and README.md are there for every format already.
usages(exported): how to load it, by each library that can.
"""
