"""Configuration keys that solo_d2 adds to Detectron2's defaults."""

from collections.abc import Sequence
from typing import Any

import yaml
from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg
from detectron2.utils.file_io import PathManager

from .errors import UserError, one_line


def load_config(config_file: str = "", *, data: Sequence[str] = (), opts: Sequence[str] = ()) -> CN:
    """Defaults, then a config file, then data sets, then KEY VALUE pairs.

    Args:
        config_file: a yaml file; "" for none.
        data: json and image folder for training, json and image folder for validation, or nothing.
        opts: keys and values in turn.

    Raises:
        UserError: a file is missing, a key is unknown or a value has the wrong type.
    """
    cfg = get_cfg()
    add_solo_d2_config(cfg)
    if config_file and not PathManager.isfile(config_file):
        raise UserError(f"no config file {config_file}")
    try:
        if config_file:
            # read as merge_from_file does
            content = CN.load_yaml_with_base(config_file, allow_unsafe=True)
            if "POINT_HEAD" in (content.get("MODEL") or ()):
                add_point_rend_config(cfg)
            cfg.merge_from_file(config_file)
        if data:
            custom = cfg.DATASETS.CUSTOM
            custom.TRAIN_JSON, custom.TRAIN_IMAGES, custom.VAL_JSON, custom.VAL_IMAGES = data
        cfg.merge_from_list(list(opts))
    except (KeyError, ValueError, TypeError, AssertionError, OSError, yaml.YAMLError) as error:
        raise UserError(f"config {config_file}: {one_line(error)}") from error
    return cfg


def add_point_rend_config(cfg: CN) -> None:
    """Add the keys of PointRend, which Detectron2 ships as a project, and register its heads."""
    from detectron2.projects.point_rend import add_pointrend_config

    add_pointrend_config(cfg)


def num_classes_keys(cfg: CN) -> tuple[str, ...]:
    """Names of the keys that tell the model of ``cfg`` its number of classes."""
    architecture = cfg.MODEL.META_ARCHITECTURE
    if architecture in _NUM_CLASSES_KEYS:
        return (_NUM_CLASSES_KEYS[architecture],)
    if cfg.MODEL.PROPOSAL_GENERATOR.NAME == "FCOSProposalGenerator":
        return ("MODEL.FCOS.NUM_CLASSES", "MODEL.ROI_HEADS.NUM_CLASSES")
    if "POINT_HEAD" in cfg.MODEL:
        return ("MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.POINT_HEAD.NUM_CLASSES")
    return ("MODEL.ROI_HEADS.NUM_CLASSES",)


def get_value(cfg: CN, key: str) -> Any:
    """The value of a key such as "MODEL.MASK_ON"."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


_NUM_CLASSES_KEYS = {
    "SOLO": "MODEL.SOLO.NUM_CLASSES",
    "DecoupledSOLO": "MODEL.SOLO.NUM_CLASSES",
    "SOLOv2": "MODEL.SOLO.NUM_CLASSES",
    "YOLACT": "MODEL.YOLACT.NUM_CLASSES",
    "AdaptIS": "MODEL.ADAPTIS.NUM_THINGS",
    "RetinaNet": "MODEL.RETINANET.NUM_CLASSES",
    "FCOS": "MODEL.RETINANET.NUM_CLASSES",
}


def add_solo_d2_config(cfg: CN) -> None:
    """Add every key of solo_d2 to ``cfg``, in place. Call it before ``cfg.merge_from_file``."""
    _add_data(cfg)
    _add_input(cfg)
    _add_training(cfg)
    _add_backbones(cfg)
    _add_vovnet(cfg)
    _add_solo(cfg)
    _add_decoupled_solo(cfg)
    _add_solov2(cfg)
    _add_adaptis(cfg)
    _add_fcos(cfg)
    _add_centermask(cfg)
    _add_yolact(cfg)


def _add_data(cfg: CN) -> None:
    # Your own COCO-format data. When TRAIN_JSON or VAL_JSON is set, the sets are registered as
    # "<NAME>_train" / "<NAME>_val" and replace DATASETS.TRAIN / DATASETS.TEST. A relative path that
    # does not exist is looked up under $DETECTRON2_DATASETS as well.
    cfg.DATASETS.CUSTOM = CN()
    cfg.DATASETS.CUSTOM.NAME = "custom"
    cfg.DATASETS.CUSTOM.TRAIN_JSON = ""
    cfg.DATASETS.CUSTOM.TRAIN_IMAGES = ""
    cfg.DATASETS.CUSTOM.VAL_JSON = ""
    cfg.DATASETS.CUSTOM.VAL_IMAGES = ""

    # Train and evaluate on the same first images with objects of DATASETS.TRAIN, so many of them:
    # shows whether a model and its data can be learnt at all. 0: off.
    cfg.DATASETS.OVERFIT_IMAGES = 0
    # The same with the images of these ids.
    cfg.DATASETS.OVERFIT_IMAGE_IDS = ()

    # The embedded data set: "shapes_train" and "shapes_val", drawn on first use.
    cfg.DATASETS.SHAPES = CN()
    cfg.DATASETS.SHAPES.TRAIN_IMAGES = 2000
    cfg.DATASETS.SHAPES.VAL_IMAGES = 200
    # Height and width in pixels.
    cfg.DATASETS.SHAPES.IMAGE_SIZE = (128, 128)
    cfg.DATASETS.SHAPES.SEED = 0

    # The toy sets of the AdaptIS paper, likewise: "rods_*" (straight rods that cover each other)
    # and "tubes_*" (bent tubes and ellipses, slightly transparent). Numbers and sizes as published.
    cfg.DATASETS.RODS = CN()
    cfg.DATASETS.RODS.TRAIN_IMAGES = 10000
    cfg.DATASETS.RODS.VAL_IMAGES = 2000
    cfg.DATASETS.RODS.IMAGE_SIZE = (96, 96)
    cfg.DATASETS.RODS.SEED = 0
    cfg.DATASETS.TUBES = CN()
    cfg.DATASETS.TUBES.TRAIN_IMAGES = 25000
    cfg.DATASETS.TUBES.VAL_IMAGES = 1000
    cfg.DATASETS.TUBES.IMAGE_SIZE = (128, 128)
    cfg.DATASETS.TUBES.SEED = 0

    # Give crowd regions to the model as well, as instances with the field gt_crowd. For those
    # architectures that learn to leave them out (YOLACT, AdaptIS); the others never see them.
    cfg.INPUT.KEEP_CROWD = False


def _add_input(cfg: CN) -> None:
    # Resize to a square of so many pixels, in training and inference, with neither the aspect ratio
    # kept nor antialiasing; it replaces MIN_SIZE_* and MAX_SIZE_*. YOLACT was published with 550.
    # 0: off.
    cfg.INPUT.SQUARE_SIZE = 0
    # "default" is Detectron2's (CROP, resize, RANDOM_FLIP); "ssd" is YOLACT's (CROP, the three of
    # INPUT.SSD in their order, RANDOM_FLIP, resize). With "ssd", an image that lost all of its
    # objects is replaced by another one.
    cfg.INPUT.AUGMENTATION = "default"
    cfg.INPUT.SSD = CN()
    # Change brightness, contrast, saturation and hue.
    cfg.INPUT.SSD.PHOTOMETRIC = True
    # Every second image is put on a canvas of up to so many times its sides; 1: none is. The colour
    # of the canvas is in the order RGB, whatever INPUT.FORMAT is.
    cfg.INPUT.SSD.MAX_EXPAND = 4.0
    cfg.INPUT.SSD.FILL = [123.68, 116.78, 103.94]
    # Cut out a window that holds the centre of an object; objects with their centres outside leave.
    cfg.INPUT.SSD.CROP = True
    # Windows must overlap an object by a random minimum of IoU, as in SSD. The published code of
    # YOLACT tests in a way that never fails.
    cfg.INPUT.SSD.CROP_IOU_TEST = False
    # Boxes that are tight around what the window left of the masks, as Detectron2's after a crop.
    # False: only clipped to the window, as published.
    cfg.INPUT.SSD.TIGHT_BOXES = True
    # Objects whose boxes are not wider and higher than this, in pixels of the network's input,
    # leave. The published code means 4, but drops empty ones only.
    cfg.INPUT.SSD.MIN_BOX_SIZE = 0.0


def _add_training(cfg: CN) -> None:
    # Batch size that BASE_LR, WARMUP_ITERS, STEPS, MAX_ITER belong to. When it is not 0 and differs
    # from IMS_PER_BATCH, BASE_LR is multiplied by IMS_PER_BATCH / LR_REFERENCE_BATCH (the linear
    # rule, arXiv 1706.02677); the schedule is left alone.
    cfg.SOLVER.LR_REFERENCE_BATCH = 0
    # "SGD" as in Detectron2, or "AdamW" with the same parameter groups.
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Largest L2 norm of all gradients together; 0: no limit. SOLVER.CLIP_GRADIENTS looks at each
    # parameter alone.
    cfg.SOLVER.CLIP_TOTAL_GRAD_NORM = 0.0
    # Stop at the first loss that is inf or NaN and write nonfinite_loss.json to OUTPUT_DIR. False
    # makes no step with that batch, says so, and goes on.
    cfg.SOLVER.STOP_ON_NONFINITE_LOSS = True
    # Load what fits of MODEL.WEIGHTS, with warnings, where the rest is for another number of
    # classes or another architecture; False refuses such a file.
    cfg.MODEL.WEIGHTS_SKIP_MISMATCHED = False
    # Keep model_best.pth by this evaluation metric; "" keeps none. With several test sets it is
    # preceded by the name of one: "<name>/segm/AP".
    cfg.TEST.BEST_METRIC = "segm/AP"
    # After each evaluation, draw so many test images with ground truth and prediction; 0: none.
    cfg.TEST.VIS_IMAGES = 8
    # Predictions below this score are not drawn.
    cfg.TEST.VIS_SCORE_THRESH = 0.3


def _add_backbones(cfg: CN) -> None:
    # Keep batch norms of the backbone in eval mode while training: their affine parameters train,
    # their statistics do not (the recipe of mmdetection; for small batches).
    cfg.MODEL.BACKBONE.FREEZE_BN_STATS = False

    # Of a stage in RESNETS.DEFORM_ON_PER_STAGE, the blocks whose index this divides are deformable;
    # 1: all. And whether their 3x3 convolutions have a bias. YOLACT++ with ResNet-101 has 3, True.
    cfg.MODEL.RESNETS.DEFORM_INTERVAL = 1
    cfg.MODEL.RESNETS.DEFORM_BIAS = False

    # DarkNet-53 as a bottom-up backbone: res1..res5 at strides 2..32. The stages have 2 to 32 times
    # the stem's channels; NORM as in RESNETS.
    cfg.MODEL.DARKNET = CN()
    cfg.MODEL.DARKNET.DEPTH = 53
    cfg.MODEL.DARKNET.OUT_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.DARKNET.STEM_OUT_CHANNELS = 32
    cfg.MODEL.DARKNET.NORM = "BN"

    # torchvision's MobileNetV2 as a bottom-up backbone: res2..res5 at strides 4..32.
    cfg.MODEL.MOBILENETV2 = CN()
    cfg.MODEL.MOBILENETV2.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.MOBILENETV2.WIDTH_MULT = 1.0
    # "FrozenBN" or "BN".
    cfg.MODEL.MOBILENETV2.NORM = "FrozenBN"


def _add_vovnet(cfg: CN) -> None:
    # VoVNetV2 as a bottom-up backbone: stem and stage2 at stride 4, stage3..stage5 at 8..32.
    cfg.MODEL.VOVNET = CN()
    # "V-19-slim-dw-eSE", "V-19-dw-eSE", "V-19-slim-eSE", "V-19-eSE", "V-39-eSE", "V-57-eSE" or
    # "V-99-eSE".
    cfg.MODEL.VOVNET.CONV_BODY = "V-39-eSE"
    cfg.MODEL.VOVNET.OUT_FEATURES = ["stage2", "stage3", "stage4", "stage5"]
    # Factor on all widths; published weights are for 1.
    cfg.MODEL.VOVNET.WIDTH_MULT = 1.0
    # "FrozenBN", "BN", "SyncBN" or "GN".
    cfg.MODEL.VOVNET.NORM = "FrozenBN"
    # stage2..stage5 with deformable 3x3 convolutions (no effect on the "dw" bodies), v2 of them,
    # and groups of offsets, of which there is one.
    cfg.MODEL.VOVNET.STAGE_WITH_DCN = (False, False, False, False)
    cfg.MODEL.VOVNET.WITH_MODULATED_DCN = False
    cfg.MODEL.VOVNET.DEFORMABLE_GROUPS = 1


def _add_solo(cfg: CN) -> None:
    # What SOLO, Decoupled SOLO and SOLOv2 share. The defaults are SOLOv2's.
    cfg.MODEL.SOLO = CN()
    # -1: as many as the training set's metadata has.
    cfg.MODEL.SOLO.NUM_CLASSES = -1
    # One entry per level in the next four: the feature, the stride it is resized to, the number of
    # grid cells along each axis, and the range (both ends inclusive) of sqrt(box area) in pixels.
    cfg.MODEL.SOLO.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.SOLO.STRIDES = [8, 8, 16, 32, 32]
    cfg.MODEL.SOLO.NUM_GRIDS = [40, 36, 24, 16, 12]
    cfg.MODEL.SOLO.SCALE_RANGES = [[1, 96], [48, 192], [96, 384], [192, 768], [384, 2048]]
    # Side of the centre region in fractions of the box side ("sigma" or epsilon in the papers).
    cfg.MODEL.SOLO.CENTER_SIGMA = 0.2
    # Convolutions per tower, their width and normalisation ("GN": 32 groups).
    cfg.MODEL.SOLO.NUM_CONVS = 4
    cfg.MODEL.SOLO.CONV_DIM = 512
    cfg.MODEL.SOLO.NORM = "GN"
    # Deformable convolutions of the towers: "none", "last" or "all"; MODULATED selects v2.
    cfg.MODEL.SOLO.DEFORM = "none"
    cfg.MODEL.SOLO.DEFORM_MODULATED = False
    # What a cell of the category branch sees of the feature: "interpolate" (a bilinear sample at
    # its centre), "adaptive_pool" (the maximum over it), "region_grid" (the mean of 2 x 2 samples).
    cfg.MODEL.SOLO.CATEGORY_ALIGN = "interpolate"
    # Append x and y coordinates to the input of the mask (or kernel) towers.
    cfg.MODEL.SOLO.COORD_CONV = True
    # Probability that the category branch gives to each class before training, and the mask branch
    # of SOLO and Decoupled SOLO to each pixel.
    cfg.MODEL.SOLO.PRIOR_PROB = 0.01

    cfg.MODEL.SOLO.FOCAL_LOSS_ALPHA = 0.25
    cfg.MODEL.SOLO.FOCAL_LOSS_GAMMA = 2.0
    cfg.MODEL.SOLO.CATEGORY_LOSS_WEIGHT = 1.0
    # "dice", "focal" or "bce" (binary cross-entropy): the mean over the masks. The weight is for
    # dice; the other two are means over pixels and need another.
    cfg.MODEL.SOLO.MASK_LOSS_TYPE = "dice"
    cfg.MODEL.SOLO.MASK_LOSS_WEIGHT = 3.0
    # At most so many (instance, cell) pairs per image enter the mask loss, drawn at random; 0: all.
    cfg.MODEL.SOLO.MAX_POSITIVES = 0
    # Treat box widths as x2 - x1 - 1, as mmdetection v1 did; needed only to repeat its targets.
    cfg.MODEL.SOLO.INCLUSIVE_BOXES = False
    # Pad masks to the batch before reducing them (exact). False reduces the unpadded mask as
    # AdelaiDet does, which shifts targets when a side is not a multiple of the mask stride.
    cfg.MODEL.SOLO.PAD_BEFORE_REDUCTION = True

    cfg.MODEL.SOLO.SCORE_THRESH_TEST = 0.1
    cfg.MODEL.SOLO.MASK_THRESH_TEST = 0.5
    # Candidates by category score before any mask is made; 0: all above SCORE_THRESH_TEST.
    cfg.MODEL.SOLO.MAX_CANDIDATES_TEST = 0
    # Masks that enter the NMS.
    cfg.MODEL.SOLO.TOPK_CANDIDATES_TEST = 500
    # "matrix" (Matrix NMS) or "mask" (greedy, per class, by mask IoU).
    cfg.MODEL.SOLO.NMS_TYPE = "matrix"
    # Matrix NMS: "gaussian" or "linear", the factor in exp(-sigma * iou ** 2), and the smallest
    # score that survives the decay.
    cfg.MODEL.SOLO.NMS_KERNEL = "gaussian"
    cfg.MODEL.SOLO.NMS_SIGMA = 2.0
    # Give duplicates the score 0 instead of the published code's NaN (linear kernel; both drop).
    cfg.MODEL.SOLO.NMS_FINITE = False
    cfg.MODEL.SOLO.UPDATE_THRESH_TEST = 0.05
    # Greedy NMS: a mask that overlaps a better one of its class by more than this is dropped.
    cfg.MODEL.SOLO.NMS_THRESH_TEST = 0.5


def _add_decoupled_solo(cfg: CN) -> None:
    cfg.MODEL.DECOUPLED_SOLO = CN()
    # One mask tower for columns and rows, as in Decoupled SOLO Light, instead of one each.
    cfg.MODEL.DECOUPLED_SOLO.SHARED_TOWER = False


def _add_solov2(cfg: CN) -> None:
    cfg.MODEL.SOLOV2 = CN()
    # Channels of the mask feature; a dynamic kernel has MASK_DIM * KERNEL_SIZE ** 2 weights.
    cfg.MODEL.SOLOV2.MASK_DIM = 256
    # Side of the dynamic kernel: 1, or 3 for the paper's ablation.
    cfg.MODEL.SOLOV2.KERNEL_SIZE = 1
    # Inputs and inner width of the mask feature branch; the last input gets the coordinates.
    cfg.MODEL.SOLOV2.MASK_IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.SOLOV2.MASK_CONV_DIM = 128
    # Deformable convolutions throughout the mask feature branch.
    cfg.MODEL.SOLOV2.MASK_DEFORM = False


def _add_adaptis(cfg: CN) -> None:
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


def _add_yolact(cfg: CN) -> None:
    # The defaults are those of the published YOLACT-550; YOLACT++ changes the anchors and
    # switches MASK_IOU on.
    cfg.MODEL.YOLACT = CN()
    # Without background. -1: as many as the training set's metadata has.
    cfg.MODEL.YOLACT.NUM_CLASSES = -1
    # Features of the backbone, finest first, strides doubling; the pyramid adds coarser levels
    # until there is one for each entry of ANCHOR_SIZES.
    cfg.MODEL.YOLACT.IN_FEATURES = ["res3", "res4", "res5"]
    # Channels of the pyramid, the prediction head and the protonet; and the prototypes.
    cfg.MODEL.YOLACT.CONV_DIM = 256
    cfg.MODEL.YOLACT.NUM_PROTOTYPES = 32
    # Norm of their convolutions but the last ones. The published "" is for backbones from ImageNet
    # and small steps; "GN" lets a model from scratch learn at the rates of the others.
    cfg.MODEL.YOLACT.NORM = ""
    # Factor on the initial weights that predict boxes, classes, coefficients and semantic labels.
    # The published 1 is for backbones from ImageNet. From scratch the first thing that masks learn
    # of random coefficients is to vanish, with the prototypes; small ones let these live.
    cfg.MODEL.YOLACT.PREDICTOR_GAIN = 1.0

    # Anchors: a size per level in pixels of the network's input, to be scaled with that (the models
    # for 400 and 700 pixels have the sizes times 400 / 550 and 700 / 550, truncated); so many sizes
    # from one octave to the next (++: 3); widths over heights.
    cfg.MODEL.YOLACT.ANCHOR_SIZES = [24, 48, 96, 192, 384]
    cfg.MODEL.YOLACT.ANCHORS_PER_OCTAVE = 1
    cfg.MODEL.YOLACT.ANCHOR_ASPECT_RATIOS = [1.0, 0.5, 2.0]
    # Make the heights of all anchors equal to their widths, as the published code did by mistake;
    # the weights of YOLACT need it. False for ++, SBD, and better when trained anew.
    cfg.MODEL.YOLACT.SQUARE_ANCHORS = True

    # IoU with the best object below which an anchor is background, and from which it is positive;
    # between the two it is ignored.
    cfg.MODEL.YOLACT.IOU_THRESHOLDS = [0.4, 0.5]
    # Background anchors with more than this share of their area in a crowd region are ignored
    # (crowds come with INPUT.KEEP_CROWD); 1.0: none.
    cfg.MODEL.YOLACT.CROWD_THRESH = 0.7
    # Hard negatives in the class loss per positive anchor of the same image.
    cfg.MODEL.YOLACT.NEG_POS_RATIO = 3
    # At most so many positive anchors of an image enter the mask loss, drawn at random (the model
    # for 700 pixels: 300); 0: all.
    cfg.MODEL.YOLACT.MASKS_TO_TRAIN = 100
    # Divide the mask loss of an instance by its box's area; False: by that of the image.
    cfg.MODEL.YOLACT.MASK_AREA_NORM = True
    cfg.MODEL.YOLACT.BOX_LOSS_WEIGHT = 1.5
    cfg.MODEL.YOLACT.CLASS_LOSS_WEIGHT = 1.0
    cfg.MODEL.YOLACT.MASK_LOSS_WEIGHT = 6.125
    cfg.MODEL.YOLACT.SEMANTIC_LOSS_WEIGHT = 1.0

    # Masks are cropped with boxes: "output", in training at the size of the prototypes and at
    # inference at that of the image, so that no pixel is outside of its box; "prototype", both at
    # the size of the prototypes, as published; "none".
    cfg.MODEL.YOLACT.CROP = "output"
    # The crop at the size of the prototypes is so much wider on each side, in their pixels.
    cfg.MODEL.YOLACT.CROP_PADDING = 1.0

    # YOLACT++: a small network predicts from each mask its IoU with the truth.
    cfg.MODEL.YOLACT.MASK_IOU = CN()
    cfg.MODEL.YOLACT.MASK_IOU.ENABLED = False
    cfg.MODEL.YOLACT.MASK_IOU.LOSS_WEIGHT = 25.0
    # Only objects of more than so many pixels at the size of the prototypes train it.
    cfg.MODEL.YOLACT.MASK_IOU.MIN_AREA = 25
    # Keep its gradient away from the masks. The published code does not.
    cfg.MODEL.YOLACT.MASK_IOU.DETACH = False
    # Multiply "scores" too, and sort by that, instead of "mask_scores" only: for display.
    cfg.MODEL.YOLACT.MASK_IOU.RESCORE_BOXES = False

    # Keep batch norms as they are (neither statistics nor affine parameters are trained) where a
    # process has fewer images a step: their statistics would be too noisy. 0: never.
    cfg.MODEL.YOLACT.FREEZE_BN_BELOW = 6

    # Anchors whose best class has at most this probability are no candidates.
    cfg.MODEL.YOLACT.SCORE_THRESH_TEST = 0.05
    # "fast" (Fast NMS for each class), "cross_class" (Fast NMS of all classes together, each
    # candidate under its best) or "traditional" (greedy, for each class).
    cfg.MODEL.YOLACT.NMS_TYPE = "fast"
    cfg.MODEL.YOLACT.NMS_THRESH_TEST = 0.5
    # Fast NMS, of both kinds: how many of the best take part (in each class).
    cfg.MODEL.YOLACT.TOPK_CANDIDATES_TEST = 200
    # Fast NMS: a candidate also counts for classes other than its best if these have more than
    # this probability. The published code asks for none.
    cfg.MODEL.YOLACT.CLASS_SCORE_THRESH_TEST = 0.0
    # Hold cross-class Fast NMS to TEST.DETECTIONS_PER_IMAGE as well. The published code does not.
    cfg.MODEL.YOLACT.LIMIT_CROSS_CLASS = False
    # Only detections with a higher score are given out; 0.15 is recommended for display.
    cfg.MODEL.YOLACT.MIN_SCORE_TEST = 0.0
    # Boxes of the results: "int", truncated to whole pixels as published, or "float".
    cfg.MODEL.YOLACT.BOX_ROUNDING = "int"
    cfg.MODEL.YOLACT.MASK_THRESH_TEST = 0.5


def _add_fcos(cfg: CN) -> None:
    # FCOS as "FCOSProposalGenerator": CenterMask's boxes, and with MODEL.MASK_ON False a detector
    # by itself. The defaults are those of CenterMask's published code and configs.
    cfg.MODEL.FCOS = CN()
    # -1: as many as the training set's metadata has.
    cfg.MODEL.FCOS.NUM_CLASSES = -1
    cfg.MODEL.FCOS.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # Levels that the build_fcos_*_fpn_backbone pyramids have above the last one of the body.
    cfg.MODEL.FCOS.TOP_LEVELS = 2
    # Convolutions before the two towers and in each, and their normalisation ("GN": 32 groups).
    cfg.MODEL.FCOS.NUM_SHARE_CONVS = 0
    cfg.MODEL.FCOS.NUM_CLS_CONVS = 4
    cfg.MODEL.FCOS.NUM_BOX_CONVS = 4
    cfg.MODEL.FCOS.NORM = "GN"
    # A learnt factor on the distances of each level.
    cfg.MODEL.FCOS.USE_SCALE = True
    # Probability of each class before training.
    cfg.MODEL.FCOS.PRIOR_PROB = 0.01

    # Locations learn a box if they are nearer to its centre than this, in strides, along each axis;
    # 0: if they are in the box.
    cfg.MODEL.FCOS.CENTER_SAMPLING_RADIUS = 1.5
    # Borders between the levels, in pixels from a location to the furthest side of its box.
    cfg.MODEL.FCOS.SIZES_OF_INTEREST = [64, 128, 256, 512]
    # "giou", "iou" (its logarithm) or "linear_iou".
    cfg.MODEL.FCOS.BBOX_REG_LOSS_TYPE = "giou"
    cfg.MODEL.FCOS.FOCAL_LOSS_ALPHA = 0.25
    cfg.MODEL.FCOS.FOCAL_LOSS_GAMMA = 2.0

    # Least class probability of a box. CenterMask's paper takes 0.03 in training, which gives the
    # mask branch more boxes early on; its published code and weights 0.05.
    cfg.MODEL.FCOS.SCORE_THRESH_TRAIN = 0.05
    cfg.MODEL.FCOS.SCORE_THRESH_TEST = 0.05
    # Compare the product of class probability and centerness with that threshold instead.
    cfg.MODEL.FCOS.THRESH_WITH_CENTERNESS = False
    # Candidates per level before NMS; the overlap (IoU) that NMS allows, 0 for no NMS; boxes per
    # image after it, 0 for all. In training these are the boxes for the mask branch.
    cfg.MODEL.FCOS.PRE_NMS_TOPK_TRAIN = 1000
    cfg.MODEL.FCOS.PRE_NMS_TOPK_TEST = 1000
    cfg.MODEL.FCOS.NMS_THRESH = 0.6
    cfg.MODEL.FCOS.POST_NMS_TOPK_TRAIN = 100
    cfg.MODEL.FCOS.POST_NMS_TOPK_TEST = 50


def _add_centermask(cfg: CN) -> None:
    # "CenterMaskROIHeads"; the mask head's layers and pooling are set in MODEL.ROI_MASK_HEAD, and
    # MODEL.ROI_HEADS.NUM_CLASSES must be that of MODEL.FCOS or -1, which takes it over.
    cfg.MODEL.CENTERMASK = CN()
    # Which level a box is pooled from: "ratio" (by its share of the image's area) or "area" (by its
    # size in pixels, as in FPN).
    cfg.MODEL.CENTERMASK.ASSIGN_CRITERION = "ratio"
    # Clip boxes to the image before they are pooled, as the first CenterMask did.
    cfg.MODEL.CENTERMASK.CLIP_BOXES = False
    # Predict the IoU of each mask and rank masks by box score times this ("mask_scores").
    cfg.MODEL.CENTERMASK.MASK_IOU_ON = True
    cfg.MODEL.CENTERMASK.MASK_IOU_LOSS_WEIGHT = 1.0
    # 3x3 convolutions of that head and their channels; units of its two linear layers.
    cfg.MODEL.CENTERMASK.MASK_IOU_NUM_CONV = 4
    cfg.MODEL.CENTERMASK.MASK_IOU_CONV_DIM = 256
    cfg.MODEL.CENTERMASK.MASK_IOU_FC_DIM = 1024
