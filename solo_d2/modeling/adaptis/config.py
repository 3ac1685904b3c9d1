"""Config keys of AdaptIS. The defaults are those of the published toy models."""

from detectron2.config import CfgNode as CN
from detectron2.projects.deeplab import add_deeplab_config


def add_adaptis_config(cfg: CN) -> None:
    """Add the keys to ``cfg``, in place."""
    # keys of the dilated ResNet and of the learning rate of the Cityscapes models
    add_deeplab_config(cfg)
    # The U-Net of the toy models: one feature, "unet", of the image's size. WIDTH channels at the
    # finest level and in the output; they double from level to level, up to 512.
    cfg.MODEL.UNET = CN()
    cfg.MODEL.UNET.WIDTH = 32
    cfg.MODEL.UNET.LEVELS = 5

    cfg.MODEL.ADAPTIS = CN()
    # Training stage: "instance" (everything except the proposal head, which does not exist yet) or
    # "proposals" (only the proposal head, starting from the weights of the first stage).
    cfg.MODEL.ADAPTIS.STAGE = "instance"
    # Stuff comes before things in semantic labels. Data without stuff has one class, "background".
    cfg.MODEL.ADAPTIS.NUM_STUFF = 1
    # -1: the number of thing classes of the training set.
    cfg.MODEL.ADAPTIS.NUM_THINGS = -1
    # The data set counts stuff among its thing classes, before the things, as Detectron2's
    # Cityscapes does. So do NUM_THINGS and the classes of results.
    cfg.MODEL.ADAPTIS.THINGS_AFTER_STUFF = False

    # Features of the backbone, finest first. Several features are fused into one map with FUSE_DIM
    # channels at the stride of the first: "pyramid" (convolved, upsampled and summed) or "deeplab"
    # (DeepLabV3+, of two features).
    cfg.MODEL.ADAPTIS.IN_FEATURES = ["unet"]
    cfg.MODEL.ADAPTIS.FUSION = "pyramid"
    cfg.MODEL.ADAPTIS.FUSE_DIM = 256
    # The published heads: "toy" (3x3 convolutions, for the toy tasks) or "cityscapes" (depthwise
    # separable ones, for Cityscapes and COCO; the next three keys are 128, 192 and 128 there).
    cfg.MODEL.ADAPTIS.HEAD = "toy"
    # Channels of the selection head (and length of the control vector), of the semantic head, and
    # of the proposal head.
    cfg.MODEL.ADAPTIS.CONV_DIM = 32
    cfg.MODEL.ADAPTIS.SEMANTIC_DIM = 32
    cfg.MODEL.ADAPTIS.PROPOSAL_DIM = 32
    # Unit of the coordinates relative to a point, in pixels of the network's input. Cityscapes:
    # 280.
    cfg.MODEL.ADAPTIS.NORM_RADIUS = 42.0

    # Points per image in training. Each is on a random object; in the second stage all are on one.
    cfg.MODEL.ADAPTIS.NUM_POINTS = 12
    # Objects with fewer visible pixels in the network's input get no points.
    cfg.MODEL.ADAPTIS.MIN_OBJECT_AREA = 0
    # Probability that a point lies in an ignored region (a crowd or too small an object), whose
    # pixels do not count in the loss, while all others are background. Cityscapes: 0.025.
    cfg.MODEL.ADAPTIS.IGNORED_PROB = 0.0
    # Weight of an object's pixels in the loss of its mask; the others have 1 - LOSS_ALPHA.
    # Cityscapes: 0.25.
    cfg.MODEL.ADAPTIS.LOSS_ALPHA = 0.5
    # Targets of the points on an object in the second stage: "score" (published code: graded, for
    # all points but the worst), "top20" (paper: the best fifth by IoU against the rest) or "dual"
    # (the best fifth against the worst half).
    cfg.MODEL.ADAPTIS.PROPOSAL_TARGETS = "score"

    cfg.MODEL.ADAPTIS.TEST = CN()
    # How objects are found without given points: "proposals", "random" (at random points), or
    # "auto": proposals if the model has a proposal head.
    cfg.MODEL.ADAPTIS.TEST.MODE = "auto"
    # Average over the image and its mirror image.
    cfg.MODEL.ADAPTIS.TEST.FLIP = False
    # A pixel belongs to a mask where its probability exceeds this.
    cfg.MODEL.ADAPTIS.TEST.MASK_THRESH = 0.4
    # A mask is dropped if this share of it or more is occupied by earlier masks.
    cfg.MODEL.ADAPTIS.TEST.MAX_OCCUPIED = 0.4
    # Lowest probability of a thing class, and lowest proposal value, at a candidate.
    cfg.MODEL.ADAPTIS.TEST.THINGS_THRESH = 0.6
    cfg.MODEL.ADAPTIS.TEST.PROPOSAL_THRESH = 0.35
    # Side of the box blur of the proposal map, in pixels; up to 1: none.
    cfg.MODEL.ADAPTIS.TEST.PROPOSAL_BLUR = 5
    # Maximum number of candidates.
    cfg.MODEL.ADAPTIS.TEST.MAX_CANDIDATES = 500
    # In the random mode: the lowest probability of a thing class, and the number of rounds, each of
    # which finds at most one object.
    cfg.MODEL.ADAPTIS.TEST.RANDOM_THINGS_THRESH = 0.5
    cfg.MODEL.ADAPTIS.TEST.RANDOM_ROUNDS = 40
