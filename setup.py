"""Packaging of solo_d2. `make install` installs the pinned versions of .ci/*.lock instead."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Also packs configs/ as solo_d2/configs; an editable install reads them where they are."""

    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "solo_d2", "configs")
            shutil.rmtree(target, ignore_errors=True)  # of an earlier build
            shutil.copytree("configs", target)


setup(
    name="solo_d2",
    version="0.1.0",
    description="SOLO, SOLOv2, YOLACT, CenterMask and AdaptIS for Detectron2",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["solo_d2", "solo_d2.*"]),
    package_data={
        "solo_d2": ["model_zoo.yaml", "py.typed", "models/*/*"],
        "solo_d2.tools.click_page": ["static/*"],
        "solo_d2.tools.compare": ["templates/*"],
    },
    cmdclass={"build_py": BuildWithConfigs},
    entry_points={"console_scripts": ["solo-d2 = solo_d2.__main__:main"]},
    python_requires=">=3.10",
    # Detectron2 is required too, but cannot be named here: it has no release of its own on PyPI.
    # `python -m solo_d2 env` says how to install it; README.md has the details.
    install_requires=[
        "torch>=2.4",  # the models; 2.4 has torch.amp and weights-only loading as used here
        "torchvision>=0.19",  # deformable convolution, NMS, MobileNetV2; the pair of torch 2.4
        "numpy>=1.23",  # masks and images outside the models
        "pillow>=9.4",  # reading images; Detectron2's resize works on them
        "opencv-python-headless>=4.6",  # video, contours, drawing; headless: no libGL needed
        "pycocotools>=2.0.7",  # COCO's masks (RLE) and metrics; 2.0.6 does not build
        "pyyaml>=5.1",  # model_zoo.yaml; Detectron2's configs need it anyway
        "fvcore>=0.1.5.post20221221",  # focal loss, parameter counts; Detectron2 has it anyway
        "shapely>=2.0",  # INPUT.CROP on polygons: fvcore's CropTransform imports it
        "matplotlib>=3.5",  # figures of a comparison; Detectron2 has it anyway
        "torchmetrics>=1.4",  # panoptic quality, when AdaptIS is evaluated
        "tqdm>=4.29",  # progress of predict; Detectron2 has it anyway
    ],
    extras_require={
        "fast": ["faster-coco-eval>=1.8"],  # COCO evaluation in a third of the time or less
        # the report of a comparison
        "report": [
            "jinja2>=3.1",  # its templates
            "altair>=5.4",  # its charts: interactive ones, PNG and SVG from one description
            "vl-convert-python>=1.6",  # altair's PNG and SVG, and its JavaScript for offline pages
        ],
        # solo-d2 export, and predicting with its files; tested with torch 2.14
        "export": [
            "onnx>=1.18",  # the file format
            "onnxscript>=0.7",  # torch.onnx.export translates operators with it
            "onnxruntime>=1.23",  # runs the files
        ],
        "page": ["werkzeug>=3.0.6"],  # click-page's server; Detectron2's tensorboard has it anyway
        "video": ["av>=12"],  # predict writes H.264, which browsers play; 100 MB
    },
)
