"""Letters in the names of tensors: `logits_VBK` has the axes view, image, prototype, in this order.

V  views                    G  global views (the first ones of V)
B  images of a batch        N  any number of rows (images, crops, features)
L  blocks of a backbone     P  patches (or cells of a feature map)
D  width of a feature       K  prototypes
C  classes, or channels     H, W  height and width in pixels
"""

NO_LABEL = -1  # stands in labels_B for an image without one
