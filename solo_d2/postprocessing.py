"""From soft masks to the output size, which no other step knows."""

from detectron2.structures import Boxes, Instances

from solo_d2.layers.masks import tight_boxes, upsample_to_binary


def postprocess(
    instances: Instances,
    height: int,
    width: int,
    *,
    padded_size: tuple[int, int],
    mask_threshold: float,
) -> Instances:
    """Bring instances with soft masks from the network's frame to the output frame.

    Args:
        instances: ``image_size`` is the network's input without padding; ``pred_masks`` are soft,
            (N, h, w), and cover the padded input.
        height, width: output size.
        padded_size: height and width of the network's padded input.
        mask_threshold: a pixel is set where the soft mask exceeds this.

    Returns:
        Instances of size (height, width): ``pred_masks`` (n, height, width) bool, ``pred_boxes``
        tight around them with exclusive right and bottom; other fields are unchanged. Instances
        without a pixel are dropped: a mask may lie entirely in the padding, or vanish when resized.
    """
    masks = upsample_to_binary(
        instances.pred_masks,
        padded_size=padded_size,
        image_size=instances.image_size,
        output_size=(height, width),
        threshold=mask_threshold,
    )
    results = Instances((height, width), **instances.get_fields())
    results.pred_masks = masks
    results.pred_boxes = Boxes(tight_boxes(masks))
    # as indices, for which a GPU is waited for once; with bools each field would wait
    (kept,) = results.pred_boxes.nonempty().nonzero(as_tuple=True)
    # selecting copies all masks
    return results if len(kept) == len(results) else results[kept]
