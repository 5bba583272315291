"""Networks that judge images of official models, each through the library that it comes in. Not part of the method.

A judge takes PIL pictures, a batch at a time. What makes its numbers comparable with other people's stands beside it.
"""

from importlib import import_module
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, CLIPModel

import weights
from adversarial import load_lpips
from sample import picture_bytes
from text import checked, silence_transformers


class Clip(NamedTuple):
    """A CLIP (Radford et al. 2021): unit vectors of pictures and of prompts, (B, D) each, and the scale of their products."""

    pictures: callable
    prompts: callable
    scale: float


def load_clip(path, device, processor=None):
    """A CLIP of transformers: folder or Hugging Face id; `processor` where its files do not hold one (PickScore).

    CLIP score is 100 cos(picture, prompt). Numbers of different CLIPs cannot be compared, and the paper does not name its
    own; ViT-L/14 is usual. PickScore (Kirstain et al. 2023) is scale · cos of a CLIP ViT-H/14 trained on preferences: as the
    paper's, given the same prompts.
    """
    model, processor = load(CLIPModel, path, device), load(AutoProcessor, processor or path)

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

    Fréchet distance, precision and recall in DINOv2's features follow human judgement better than Inception's do (Stein et
    al. 2023); the paper has none, so they compare models here, not with the paper.
    """
    model, processor = load(AutoModel, path, device), load(AutoImageProcessor, path)
    model = getattr(model, "vision_model", model)  # of a CLIP, the half that sees

    @torch.no_grad()
    def features(pictures):
        return model(**processor(images=pictures, return_tensors="pt").to(device)).pooler_output.float().cpu()

    return features


def load_inception(file, device):
    """The Inception of FID (Heusel et al. 2017) from a TorchScript file, NVIDIA's inception-2015-12-05.pt -> (B, 2048).

    It takes bytes and does its own resizing, as the original does. FID depends on the number of images, so comparable with
    the paper is only one image for each of the paper's COCO prompts, against the photographs of those prompts.
    """
    with weights.explained(file, "a TorchScript network"):
        network = torch.jit.load(file, map_location=device).eval()

    @torch.no_grad()
    def features(pictures):
        pixels = torch.stack([picture_bytes(picture) for picture in pictures])      # (B, 3, H, W), uint8
        with weights.explained(file, "the Inception of FID"):
            return network(pixels.to(device), return_features=True).float().cpu()

    return features


def load_diversity(device):
    """LPIPS with AlexNet (adversarial.load_lpips) -> pictures of one prompt to their mean pairwise distance.

    None where the package is not installed. It depends on the size of the pictures: compare at the same one.
    """
    try:
        lpips = load_lpips(device, "alex")
    except weights.UserError:
        return None

    @torch.no_grad()
    def diversity(pictures):
        images = torch.stack([picture_bytes(picture) for picture in pictures]).to(device) / 127.5 - 1   # (S, 3, H, W)
        first, second = torch.combinations(torch.arange(len(images))).T
        return lpips(images[first], images[second]).item()

    return diversity


# ------------------------------------------------------------------------- preference scores, of their own packages

def load_hpsv2(device):
    """HPSv2.1 (Wu et al. 2023), times 100 as papers give it."""
    hpsv2 = package("hpsv2", "hpsv2")
    return lambda prompt, pictures: [100 * float(score) for score in hpsv2.score(pictures, prompt, hps_version="v2.1")]


def load_imagereward(device):
    """ImageReward (Xu et al. 2023), about -2 to 2."""
    model = package("ImageReward", "image-reward").load("ImageReward-v1.0", device=str(device))
    return lambda prompt, pictures: [float(model.score(prompt, [picture])) for picture in pictures]


def load_aesthetic(device):
    """The LAION aesthetic score, 1 to 10; the prompt does not matter. The head on CLIP ViT-L/14 called "sac+logos+ava1"."""
    predictor, name = package("aesthetics_predictor", "simple-aesthetics-predictor"), \
        "shunk031/aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE"
    model, processor = load(predictor.AestheticsPredictorV2Linear, name, device), load(AutoProcessor, name)

    @torch.no_grad()
    def score(prompt, pictures):
        return model(**processor(images=pictures, return_tensors="pt").to(device)).logits.flatten().tolist()

    return score


PREFERENCES = {"hpsv2": load_hpsv2, "imagereward": load_imagereward, "aesthetic": load_aesthetic}


def package(module, name):
    try:
        return import_module(module)
    except ImportError as error:
        raise weights.UserError(f"this score needs the package {name}: pip install {name} ({error})") from error


def load(kind, path, device=None):
    """Something of transformers, from a folder or a Hugging Face id; a network in fp32, never from a pickle."""
    silence_transformers()
    path = weights.find_model(path)
    with weights.explained(path, f"what {kind.__name__} opens"):
        if device is None:
            return kind.from_pretrained(path)
        model, report = kind.from_pretrained(path, use_safetensors=True, output_loading_info=True)
    return checked(model, report, path).to(device).requires_grad_(False).eval()
