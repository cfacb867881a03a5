"""Model families as data, one file each; see :mod:`lycotool.models.families.base`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lycotool.models.families.anima import ANIMA
from lycotool.models.families.base import Family
from lycotool.models.families.chroma import CHROMA
from lycotool.models.families.flux1 import FLUX1
from lycotool.models.families.flux2 import FLUX2
from lycotool.models.families.hunyuan_image import HUNYUAN_IMAGE
from lycotool.models.families.hunyuan_video import HUNYUAN_VIDEO
from lycotool.models.families.hunyuan_video_15 import HUNYUAN_VIDEO_15
from lycotool.models.families.lumina2 import LUMINA2
from lycotool.models.families.qwen_image import QWEN_IMAGE
from lycotool.models.families.sd1 import SD1
from lycotool.models.families.sd2 import SD2
from lycotool.models.families.sd3 import SD3
from lycotool.models.families.sdxl import SDXL
from lycotool.models.families.table import path_key
from lycotool.models.families.wan import WAN
from lycotool.models.families.z_image import Z_IMAGE

__all__ = ["FAMILIES", "families_of"]

#: Every family by its short name. Of two that share names or metadata, the narrower is first.
FAMILIES: Mapping[str, Family] = {
    "sdxl": SDXL,
    "sd1": SD1,
    "sd2": SD2,
    "chroma": CHROMA,
    "flux2": FLUX2,
    "flux1": FLUX1,
    "hunyuan-video-1.5": HUNYUAN_VIDEO_15,
    "hunyuan-image": HUNYUAN_IMAGE,
    "hunyuan-video": HUNYUAN_VIDEO,
    "sd3": SD3,
    "qwen-image": QWEN_IMAGE,
    "z-image": Z_IMAGE,
    "lumina2": LUMINA2,
    "anima": ANIMA,
    "wan": WAN,
}


def families_of(paths: Iterable[str]) -> list[str]:
    """The families that have most of the denoiser paths, in whatever naming; none if none has any.

    Several are given where they have equally many. A name that a family has in ComfyUI only
    counts less than one it has of its own.
    """
    keys = [path_key(path) for path in paths]
    scores = {}
    for name, family in FAMILIES.items():
        found = [namings for key in keys if (namings := family.unet.names(key))]
        scores[name] = len(found), sum(namings != {"comfy"} for namings in found)
    best = max(scores.values())
    return [name for name, score in scores.items() if score == best and score[0]]
