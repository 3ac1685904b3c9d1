"""Config keys of AdaptIS."""

from detectron2.config import CfgNode as CN


def add_adaptis_config(cfg: CN) -> None:
    """Add the keys to ``cfg``, in place."""
    # The U-Net of AdaptIS's toy models: one feature, "unet", of the image's size. Channels of the
    # finest level and of the output; they double from level to level up to a limit.
    cfg.MODEL.UNET = CN()
    cfg.MODEL.UNET.WIDTH = 32
    cfg.MODEL.UNET.MAX_WIDTH = 512
    cfg.MODEL.UNET.LEVELS = 5

    # The defaults are those of the published toy models.
    cfg.MODEL.ADAPTIS = CN()
    # Stuff comes before things in semantic labels. Data without stuff has one class, background.
    cfg.MODEL.ADAPTIS.NUM_STUFF = 1
    # -1: as many as the training set's metadata has.
    cfg.MODEL.ADAPTIS.NUM_THINGS = -1
    # What is trained: "instance" (all but the proposal head, which then does not exist) or
    # "proposals" (the proposal head alone, from the weights of the first stage).
    cfg.MODEL.ADAPTIS.STAGE = "instance"
    # Points per image in training; all from one object, or each from its own. In the second stage
    # they are always from one.
    cfg.MODEL.ADAPTIS.NUM_POINTS = 12
    cfg.MODEL.ADAPTIS.POINTS_FROM_ONE_OBJECT = False
    # Objects smaller than this, in pixels of the network's input, are not drawn. And how often
    # such an object or a crowd region is drawn in place of an object, as a region to ignore.
    cfg.MODEL.ADAPTIS.MIN_OBJECT_AREA = 0
    cfg.MODEL.ADAPTIS.IGNORED_POINT_PROB = 0.0

    # Features of the backbone, finest first. Several are fused to one map of FUSE_DIM channels at
    # the stride of the first.
    cfg.MODEL.ADAPTIS.IN_FEATURES = ["unet"]
    cfg.MODEL.ADAPTIS.FUSE_DIM = 256
    cfg.MODEL.ADAPTIS.FUSE_NORM = "BN"
    # How the control vector of a point is made: "map" (1x1 convolutions of the whole map, then
    # read at the point) or "fc" (read at the point, then linear layers).
    cfg.MODEL.ADAPTIS.CONTROLLER = "map"
    # Layers of all heads: "toy" (3x3 convolutions) or "sep" (depthwise separable ones, the models
    # for Cityscapes and COCO, which have 128, 192 and 128 channels in the next three).
    cfg.MODEL.ADAPTIS.HEAD = "toy"
    # Channels of the selection head and length of the control vector; of the semantic head; of
    # the proposal head.
    cfg.MODEL.ADAPTIS.CONV_DIM = 32
    cfg.MODEL.ADAPTIS.SEMANTIC_DIM = 32
    cfg.MODEL.ADAPTIS.PROPOSAL_DIM = 32
    cfg.MODEL.ADAPTIS.NORM = "BN"
    # Unit of the coordinates relative to a point, in pixels of the network's input; Cityscapes:
    # 280. And whether the distance from the point is a third coordinate.
    cfg.MODEL.ADAPTIS.NORM_RADIUS = 42.0
    cfg.MODEL.ADAPTIS.APPEND_DIST = True
    # Factor and offset on mask logits; (1.0, 0.0) for none.
    cfg.MODEL.ADAPTIS.RESCALE = (0.2, -1.7)
    # AdaIN follows these layers of the selection head, counted from 1. 1 is added to its bias (the
    # PyTorch code), else its scale starts at 1 (the MXNet code).
    cfg.MODEL.ADAPTIS.ADAIN_AFTER = [3]
    cfg.MODEL.ADAPTIS.ADAIN_BIAS_ONE = True
    cfg.MODEL.ADAPTIS.ADAIN_EPS = 1e-5

    # Normalized focal losses: of masks (ALPHA for Cityscapes: 0.25), of semantic labels.
    cfg.MODEL.ADAPTIS.LOSS = CN()
    cfg.MODEL.ADAPTIS.LOSS.ALPHA = 0.5
    cfg.MODEL.ADAPTIS.LOSS.GAMMA = 2.0
    cfg.MODEL.ADAPTIS.LOSS.SEM_GAMMA = 1.0
    cfg.MODEL.ADAPTIS.LOSS.SEM_WEIGHT = 0.75

    # In the second stage, keep the frozen parts in eval mode. False lets the statistics of their
    # batch norms drift, as the published code does.
    cfg.MODEL.ADAPTIS.FREEZE_BN = True
    cfg.MODEL.ADAPTIS.PROPOSAL = CN()
    # Targets of the points on an object: "score" (published code: graded, for all but the worst),
    # "top20" (paper: the best fifth by IoU against the rest) or "dual" (the same against the
    # worst half).
    cfg.MODEL.ADAPTIS.PROPOSAL.TARGET = "score"
    # Train on maps with the points' targets painted in, instead of at the points. MASK_UNSAMPLED
    # leaves out all but the objects that have points; DENSE_BACKGROUND keeps the background then.
    cfg.MODEL.ADAPTIS.PROPOSAL.DENSE = False
    cfg.MODEL.ADAPTIS.PROPOSAL.MASK_UNSAMPLED = True
    cfg.MODEL.ADAPTIS.PROPOSAL.DENSE_BACKGROUND = False
    # First value of the mask threshold, which adapts in training.
    cfg.MODEL.ADAPTIS.PROPOSAL.INIT_THRESH = 0.35

    cfg.MODEL.ADAPTIS.TEST = CN()
    # How objects are found without given points: "proposals" or "random" (at random points). A
    # model without a proposal head always does the second.
    cfg.MODEL.ADAPTIS.TEST.MODE = "proposals"
    # Mask threshold; the share of a mask that may be occupied; lowest thing probability and
    # lowest proposal value at a candidate.
    cfg.MODEL.ADAPTIS.TEST.THRESH1 = 0.4
    cfg.MODEL.ADAPTIS.TEST.THRESH2 = 0.4
    cfg.MODEL.ADAPTIS.TEST.ITHRESH = 0.6
    cfg.MODEL.ADAPTIS.TEST.FL_PROB = 0.35
    # Search for candidates: tolerance of the flooding, side of the box blur in pixels, distance
    # of the levels. FLOOD False takes every local maximum, faster.
    cfg.MODEL.ADAPTIS.TEST.FL_EPS = 0.003
    cfg.MODEL.ADAPTIS.TEST.FL_BLUR = 5
    cfg.MODEL.ADAPTIS.TEST.FL_STEP = 0.025
    cfg.MODEL.ADAPTIS.TEST.FLOOD = True
    # Half side of the window around a point that its mask may fill, -1 for no limit; candidates
    # that are looked at.
    cfg.MODEL.ADAPTIS.TEST.CUT_RADIUS = -1
    cfg.MODEL.ADAPTIS.TEST.MAX_ITERS = 500
    # Lowest mask probability of a pixel in an instance, lowest stuff probability of a pixel with
    # a semantic label, factor on the background's probability, smallest panoptic segment.
    cfg.MODEL.ADAPTIS.TEST.MIN_THINGS_PROB = 0.0
    cfg.MODEL.ADAPTIS.TEST.MIN_STUFF_PROB = 0.0
    cfg.MODEL.ADAPTIS.TEST.STUFF_PROB_MULT = 1.0
    cfg.MODEL.ADAPTIS.TEST.MIN_SEGMENT_AREA = 1
    # Average with the mirrored image; FLIP_ORIGINAL mirrors points one pixel off, as published.
    cfg.MODEL.ADAPTIS.TEST.FLIP = False
    cfg.MODEL.ADAPTIS.TEST.FLIP_ORIGINAL = False
    # Class of an instance: "mean" class probability over its mask, or "majority" of its pixels.
    cfg.MODEL.ADAPTIS.TEST.CLASS_VOTE = "mean"
    # Masks of the instances: "disjoint", or "raw" as they were before the others took their part.
    cfg.MODEL.ADAPTIS.TEST.MASKS = "disjoint"
    # Thresholds of the random-point mode (see above; THRESH2 is the share that must be free),
    # its rounds, and the points in each.
    cfg.MODEL.ADAPTIS.TEST.RANDOM = CN()
    cfg.MODEL.ADAPTIS.TEST.RANDOM.THRESH1 = 0.5
    cfg.MODEL.ADAPTIS.TEST.RANDOM.THRESH2 = 0.6
    cfg.MODEL.ADAPTIS.TEST.RANDOM.ITHRESH = 0.5
    cfg.MODEL.ADAPTIS.TEST.RANDOM.NUM_ITERS = 40
    cfg.MODEL.ADAPTIS.TEST.RANDOM.NUM_CANDIDATES = 5
