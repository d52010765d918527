"""A model of any checkpoint at any image size, to be looked into."""

from dataclasses import dataclass

import torch
from torch import Tensor

from beit.commands.settings import ViewerOptions
from beit.data.classification import ClassificationEvalTransform
from beit.inference import OneImage, Preprocessing, as_input, preprocessing_of
from beit.modeling import Backbone
from beit.training.distributed import select_device
from beit.zoo import open_model


@dataclass(frozen=True)
class Viewer(Preprocessing):
    """A model in evaluation mode, without gradients, set to the requested image size, and its preprocessing."""

    model: Backbone

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.model.cls_token.device

    def view(self, image: OneImage) -> Tensor:
        """Returns an image, not normalised, uint8 ``(1, 3, H, W)`` on the device; raises InputError if unreadable."""
        return self.transform(as_input(image, self.transform.in_chans))["image"][None].to(self.device)


def open_viewer(config: ViewerOptions, *, whole: bool = True) -> Viewer:
    """Opens a checkpoint of any format; raises InputError if it is no BEiT, or for a size that patches do not fill.

    With ``whole`` images keep all of their shorter side, as a picture should show, where evaluation crops its border.
    """
    place = select_device(config.device, 0)
    model, metadata = open_model(config.checkpoint, **config.weights)
    if config.input_size is not None:
        model.set_input_size(config.input_size)
    prepared = preprocessing_of(model, metadata)
    transform = prepared.transform
    if whole:
        how, channels = transform.interpolation, transform.in_chans
        transform = ClassificationEvalTransform(model.img_size, interpolation=how, crop_pct=1, in_chans=channels)
    return Viewer(transform, prepared.mean, prepared.std, model.requires_grad_(False).to(place))
