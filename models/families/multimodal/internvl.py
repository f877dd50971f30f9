"""InternVL 2.5, 3 and 3.5 as transformers saves them (Chen et al. 2024, arXiv:2412.05271): a plain decoder beside a tower that
reads an image in tiles."""

from __future__ import annotations

from models.decoder import Decoder
from models.encoders.vision.internvl import InternVL, internvl_vision
from models.families.multimodal.llava import BESIDE, llava_config
from models.family import Family, Tower

FAMILIES = (
    Family(
        "InternVL 2.5, 3, 3.5",
        ("InternVLForConditionalGeneration",),
        llava_config,
        Decoder,
        ignore=(BESIDE,),
        tower=Tower(internvl_vision, InternVL, BESIDE),
    ),
)
