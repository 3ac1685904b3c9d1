"""Models as files for onnxruntime or torch.export, and such files as models.

Shape shorthand of this folder:
    H, W: height and width of the graph's input, with its padding
    h, w: height and width of the soft masks
    K: candidates that a graph holds
    D: detections that a graph returns, valid ones first
    C: classes
    P: points
"""
