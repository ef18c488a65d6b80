"""Methods that keep all experts and make them narrower: HEAPr, CAMERA-P and SlimMoE's neuron pruning."""

from .prune import Prune
from .registry import register_method


@register_method("heapr")
class Heapr(Prune):
    """HEAPr (arXiv 2509.22299): the neurons stay whose removal costs most by second order."""

    defaults = {"importance": "heapr"}


@register_method("camera_p")
class CameraP(Prune):
    """CAMERA-P (arXiv 2508.02322): the neurons of most energy stay; forward passes are enough."""

    defaults = {"importance": "camera_p"}


@register_method("slim")
class Slim(Prune):
    """SlimMoE's pruning (arXiv 2506.18349): the neurons stay whose weights the distillation loss is sensitive to."""

    defaults = {"importance": "slim"}
