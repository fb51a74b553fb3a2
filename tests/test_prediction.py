"""prediction: the same logits from bytes and from numbers, and the model as it was."""

import torch
from torch import nn

from utils.prediction import device_of, predict


def test_bytes_and_pixels_give_the_same_logits_in_whatever_batches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 4)).train()
    model[2].weight.requires_grad_(False)
    images = torch.randint(0, 256, (7, 1, 4, 4), dtype=torch.uint8)
    logits = predict(model, images, "cpu")
    assert logits.shape == (7, 4) and logits.dtype == torch.float32 and not logits.requires_grad
    assert torch.allclose(predict(model, images.float() / 255, batch_size=2), logits, atol=1e-6)
    assert all(module.training for module in model.modules())
    assert int(model[1].num_batches_tracked) == 0
    assert not model[2].weight.requires_grad and model[2].bias.requires_grad


def test_a_model_without_parameters_is_on_the_cpu():
    assert device_of(nn.Flatten()) == torch.device("cpu")
