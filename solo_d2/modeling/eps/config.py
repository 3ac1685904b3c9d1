"""Config keys of EPS."""

from detectron2.config import CfgNode as CN


def add_eps_config(cfg: CN) -> None:
    """Add the keys to ``cfg``, in place."""
    cfg.MODEL.EPS = CN()
    # Without the background. -1: the number of classes of the training set.
    cfg.MODEL.EPS.NUM_CLASSES = -1
    # The maps of the backbone that are classified, one in the paper; others are resized to the
    # first. Of a feature pyramid, take all: parts whose output is not used are not trained.
    cfg.MODEL.EPS.IN_FEATURES = ["res7"]
    # False: the paper's baseline, a classifier without background and without saliency.
    cfg.MODEL.EPS.SALIENCY_LOSS = True
    # A class of the image is foreground if the saliency map overlaps more than this share of it.
    cfg.MODEL.EPS.TAU = 0.4
    # Weight of the foreground in the estimated saliency; the rest is that of 1 - background.
    cfg.MODEL.EPS.LAM = 0.5

    # Folder of saliency maps, <name of the image>.png, 8 bits; a relative path that does not exist
    # is looked up under $DETECTRON2_DATASETS as well. "": a stand-in, the union of all masks.
    cfg.MODEL.EPS.SALIENCY_FOLDER = ""
    # The stand-in is eroded by this radius, then blurred with this standard deviation (pixels).
    cfg.MODEL.EPS.STAND_IN_EROSION = 0
    cfg.MODEL.EPS.STAND_IN_BLUR = 0.0

    # With INPUT.AUGMENTATION "eps": the range of the longer side.
    cfg.MODEL.EPS.LONG_SIDES = (256, 512)

    # Inference adds up the maps of these scales and of their mirror images.
    cfg.MODEL.EPS.TEST_SCALES = (0.5, 1.0, 1.5, 2.0)
    # The score of the background everywhere, or with USE_BG_CAM its learned map instead.
    cfg.MODEL.EPS.BG_THRESHOLD = 0.2
    cfg.MODEL.EPS.USE_BG_CAM = False
