"""The networks: name → `nn.Module` from raw pixels to four logits; its checkpoint file and back.

model = build_model("Resnet")
save_model(model, "checkpoint.safetensors")
model = load_model("checkpoint.safetensors")
"""

from utils.backbones.building import announce_missing_weights, build_model
from utils.backbones.checkpoints import (
    load_model,
    load_weights,
    read_metadata,
    save_half,
    save_model,
)
from utils.backbones.classifier import Body, PixelClassifier
from utils.backbones.networks import (
    NETWORKS,
    Depthwise,
    DinoClassifier,
    Network,
    register,
)

__all__ = [
    "NETWORKS",
    "Body",
    "Depthwise",
    "DinoClassifier",
    "Network",
    "PixelClassifier",
    "announce_missing_weights",
    "build_model",
    "load_model",
    "load_weights",
    "read_metadata",
    "register",
    "save_half",
    "save_model",
]
