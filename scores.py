"""Networks that judge images of official models, each through the library that it comes in. Not part of the method.

A judge takes PIL pictures, a batch at a time. What makes its numbers comparable with other people's stands beside it.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, CLIPModel

import weights
from pictures import picture_bytes
from text import silence_transformers


class Clip(NamedTuple):
    """A CLIP (Radford et al. 2021): unit vectors of pictures and prompts, (B, D) each; the scale of their products."""

    pictures: callable
    prompts: callable
    scale: float


def load_clip(path, device, processor=None):
    """A CLIP of transformers: folder or Hugging Face id; `processor` where its files do not hold one (PickScore).

    CLIP score is 100 cos(picture, prompt). Numbers of different CLIPs cannot be compared, and the paper does not name
    its own; ViT-L/14 is usual. PickScore (Kirstain et al. 2023) is scale · cos of a CLIP ViT-H/14 trained on
    preferences: as the paper's, given the same prompts.
    """
    model, processor = load_network(CLIPModel, path, device), load_processor(AutoProcessor, processor or path)

    @torch.no_grad()
    def embed_pictures(pictures):
        pixels = processor.image_processor(images=pictures, return_tensors="pt").to(device)
        return F.normalize(model.get_image_features(**pixels).pooler_output.float(), dim=1).cpu()

    @torch.no_grad()
    def embed_prompts(prompts):
        tokens = processor.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt",
                                     max_length=model.config.text_config.max_position_embeddings).to(device)
        return F.normalize(model.get_text_features(**tokens).pooler_output.float(), dim=1).cpu()

    return Clip(embed_pictures, embed_prompts, model.logit_scale.exp().item())


def load_vision_model(path, device):
    """Any vision model of transformers with a pooled output, e.g. DINOv2 -> pictures to features (B, D).

    Fréchet distance, precision and recall in DINOv2's features follow human judgement better than Inception's do (Stein
    et al. 2023). The paper has none, so they compare models here, not with the paper.
    """
    model, processor = load_network(AutoModel, path, device), load_processor(AutoImageProcessor, path)
    model = getattr(model, "vision_model", model)  # of a CLIP, the half that sees

    @torch.no_grad()
    def features(pictures):
        inputs = processor(images=pictures, return_tensors="pt").to(device)
        with weights.library_errors(path, "be used as a vision model with a pooled output"):
            return model(**inputs).pooler_output.flatten(1).float().cpu()

    return features


def load_inception(file, device):
    """The Inception of FID (Heusel et al. 2017) from a TorchScript file, NVIDIA's inception-2015-12-05.pt -> (B, 2048).

    It takes bytes and does its own resizing, as the original does. FID depends on the number of images: only one image
    for each of the paper's COCO prompts, against the photographs of those prompts, compares with the paper.
    """
    with weights.library_errors(file, "be read as a TorchScript network"):
        network = torch.jit.load(file, map_location=device).eval()

    @torch.no_grad()
    def features(pictures):
        pixels = torch.stack([picture_bytes(picture) for picture in pictures])          # (B, 3, H, W), uint8
        with weights.library_errors(file, "be run as the Inception of FID"):
            return network(pixels.to(device), return_features=True).float().cpu()

    return features


def load_lpips(device):
    """LPIPS (Zhang et al. 2018) with AlexNet -> pictures of one prompt to their mean pairwise distance.

    None where the package lpips is not installed. It depends on the size of the pictures: compare at the same one.
    """
    try:
        from lpips import LPIPS  # an extra
    except ImportError:
        return None
    network = LPIPS(net="alex", verbose=False).to(device).requires_grad_(False).eval()

    @torch.no_grad()
    def diversity(pictures):
        images = torch.stack([picture_bytes(picture) for picture in pictures]).to(device) / 127.5 - 1   # (S, 3, H, W)
        first, second = torch.combinations(torch.arange(len(images))).T
        return network(images[first], images[second]).mean().item()

    return diversity


def load_network(kind, path, device):
    """A network of transformers in fp32, from a folder or a Hugging Face id; never from a pickle."""
    silence_transformers()
    path = weights.find_model(path)
    with weights.library_errors(path, f"be opened by {kind.__name__}"):
        model, report = kind.from_pretrained(path, use_safetensors=True, output_loading_info=True)
    if report["missing_keys"]:
        raise weights.UserError(f"{path}: tensor {min(report['missing_keys'])} is missing")
    for name, tensor in model.state_dict().items():
        weights.check_finite(path, name, tensor)
    return model.to(device).requires_grad_(False).eval()


def load_processor(kind, path):
    """What brings pictures, or prompts, into a network's form: likewise."""
    path = weights.find_model(path)
    with weights.library_errors(path, f"be opened by {kind.__name__}"):
        return kind.from_pretrained(path)
