"""Config keys of SOLO, Decoupled SOLO and SOLOv2."""

from detectron2.config import CfgNode as CN


def add_solo_config(cfg: CN) -> None:
    """Add the keys to ``cfg``, in place."""
    # Shared by SOLO, Decoupled SOLO and SOLOv2. The defaults are SOLOv2's.
    cfg.MODEL.SOLO = CN()
    # -1: the number of classes of the training set.
    cfg.MODEL.SOLO.NUM_CLASSES = -1
    # The next four keys have one entry per level: the feature, the stride it is resized to, the
    # number of grid cells along each axis, and the range of sqrt(box area) in pixels, inclusive.
    cfg.MODEL.SOLO.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.SOLO.STRIDES = [8, 8, 16, 32, 32]
    cfg.MODEL.SOLO.NUM_GRIDS = [40, 36, 24, 16, 12]
    cfg.MODEL.SOLO.SCALE_RANGES = [[1, 96], [48, 192], [96, 384], [192, 768], [384, 2048]]
    # Side of the center region in fractions of the box side ("sigma" or epsilon in the papers).
    cfg.MODEL.SOLO.CENTER_SIGMA = 0.2
    # Number of convolutions per tower, and their channels.
    cfg.MODEL.SOLO.NUM_CONVS = 4
    cfg.MODEL.SOLO.CONV_DIM = 512
    # Which convolutions of the towers are deformable: "none", "last" or "all"; MODULATED selects
    # DCNv2.
    cfg.MODEL.SOLO.DEFORM = "none"
    cfg.MODEL.SOLO.DEFORM_MODULATED = False
    # How a cell of the category branch reads the feature: "interpolate" (a bilinear sample at its
    # center), "adaptive_pool" (the maximum over it), "region_grid" (the mean of 2 x 2 samples).
    cfg.MODEL.SOLO.CATEGORY_ALIGN = "interpolate"
    # Append x and y coordinates to the input of the mask (or kernel) towers.
    cfg.MODEL.SOLO.COORD_CONV = True
    # Probability before training: of each class in the category branch, and of each pixel in the
    # mask branch of SOLO and Decoupled SOLO.
    cfg.MODEL.SOLO.PRIOR_PROB = 0.01

    # "dice", "focal" or "bce" (binary cross-entropy). The default weight suits dice; the other two
    # are means over pixels and need a larger one.
    cfg.MODEL.SOLO.MASK_LOSS_TYPE = "dice"
    cfg.MODEL.SOLO.MASK_LOSS_WEIGHT = 3.0
    # Limit on the (instance, cell) pairs per image in the mask loss, chosen at random; 0: no limit.
    cfg.MODEL.SOLO.MAX_POSITIVES = 0
    # Downsample mask targets after padding, which is exact. False: before, as AdelaiDet does; its
    # targets are off where a side is not a multiple of the mask stride.
    cfg.MODEL.SOLO.PAD_BEFORE_DOWNSAMPLING = True

    cfg.MODEL.SOLO.SCORE_THRESH_TEST = 0.1
    cfg.MODEL.SOLO.MASK_THRESH_TEST = 0.5
    # Maximum number of candidates, by category score, before any mask is made; 0: no limit.
    cfg.MODEL.SOLO.MAX_CANDIDATES_TEST = 0
    # Maximum number of masks that enter NMS.
    cfg.MODEL.SOLO.TOPK_CANDIDATES_TEST = 500
    # "matrix" (Matrix NMS) or "mask" (greedy, per class, by mask IoU).
    cfg.MODEL.SOLO.NMS_TYPE = "matrix"
    # Matrix NMS: "gaussian" or "linear", the factor in exp(-sigma * iou ** 2), and the smallest
    # score that survives the decay.
    cfg.MODEL.SOLO.NMS_KERNEL = "gaussian"
    cfg.MODEL.SOLO.NMS_SIGMA = 2.0
    cfg.MODEL.SOLO.UPDATE_THRESH_TEST = 0.05
    # Greedy NMS: a mask that overlaps a better one of its class by more than this is dropped.
    cfg.MODEL.SOLO.NMS_THRESH_TEST = 0.5

    cfg.MODEL.DECOUPLED_SOLO = CN()
    # One mask tower for columns and rows, as in Decoupled SOLO Light, instead of one each.
    cfg.MODEL.DECOUPLED_SOLO.SHARED_TOWER = False

    cfg.MODEL.SOLOV2 = CN()
    # Channels of the mask feature; a dynamic kernel has MASK_DIM * KERNEL_SIZE ** 2 weights.
    cfg.MODEL.SOLOV2.MASK_DIM = 256
    # Side of the dynamic kernel: 1, or 3 for the paper's ablation.
    cfg.MODEL.SOLOV2.KERNEL_SIZE = 1
    # Inputs and inner channels of the mask feature branch; coordinates are appended to the last
    # input.
    cfg.MODEL.SOLOV2.MASK_IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.SOLOV2.MASK_CONV_DIM = 128
    # Deformable convolutions throughout the mask feature branch.
    cfg.MODEL.SOLOV2.MASK_DEFORM = False
