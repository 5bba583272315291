"""What a set of images is worth: Fréchet distance and, for official models, networks that judge pictures.

Not part of the method. The networks come from transformers. A judge takes PIL pictures, a batch at a time.
"""

import torch
import torch.nn.functional as F
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, CLIPModel

import weights
from pictures import picture_bytes


def gaussian(features):
    """Mean (D,) and covariance (D, D) of features (N, D), in double precision."""
    features = features.cpu().double()
    return features.mean(0), torch.cov(features.T)


def frechet_distance(a, b):
    """Fréchet distance between two Gaussians, each a mean (D,) and a covariance (D, D).

    |μa - μb|² + tr(Ca + Cb - 2 (Ca^½ Cb Ca^½)^½) (Heusel et al. 2017). Roots are taken of eigenvalues of symmetric
    matrices: no complex parts, and singular covariances (few samples) do no harm.
    """
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T                             # (D, D)
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()


# --------------------------------------------------------------------------------------------------------- judges

def load_clip(path, device):
    """A CLIP (Radford et al. 2021) of transformers, folder or Hugging Face id -> functions of pictures and of prompts.

    Both give unit vectors (B, D). The CLIP score is 100 cos(picture, prompt). Scores of different CLIPs cannot be
    compared, and the paper does not name its own. PickScore is this cosine from another CLIP, times its logit scale.
    """
    model, processor = load_network(CLIPModel, AutoProcessor, path, device)

    @torch.no_grad()
    def embed_pictures(pictures):
        pixels = processor.image_processor(images=pictures, return_tensors="pt").to(device)
        return F.normalize(model.get_image_features(**pixels).pooler_output.float(), dim=1).cpu()

    @torch.no_grad()
    def embed_prompts(prompts):
        tokens = processor.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt",
                                     max_length=model.config.text_config.max_position_embeddings).to(device)
        return F.normalize(model.get_text_features(**tokens).pooler_output.float(), dim=1).cpu()

    return embed_pictures, embed_prompts


def load_vision_model(path, device):
    """Any vision model of transformers with a pooled output, e.g. DINOv2 -> a function from pictures to (B, D).

    The Fréchet distance in DINOv2's features follows human judgement better than in Inception's (Stein et al. 2023).
    """
    model, processor = load_network(AutoModel, AutoImageProcessor, path, device)
    model = getattr(model, "vision_model", model)  # of a CLIP, its image tower

    @torch.no_grad()
    def features(pictures):
        inputs = processor(images=pictures, return_tensors="pt").to(device)
        return model(**inputs).pooler_output.flatten(1).float().cpu()

    return features


def load_inception(file, device):
    """The Inception of FID (Heusel et al. 2017) in TorchScript, NVIDIA's inception-2015-12-05.pt -> (B, 2048).

    It takes bytes and does its own resizing, as the original does.
    """
    with weights.library_errors(file, "be read as a TorchScript network"):
        network = torch.jit.load(file, map_location=device).eval()

    @torch.no_grad()
    def features(pictures):
        pixels = torch.stack([picture_bytes(picture) for picture in pictures])          # (B, 3, H, W), uint8
        return network(pixels.to(device), return_features=True).float().cpu()

    return features


def load_network(kind, processor, path, device):
    """A network of transformers in fp32 and what prepares its input; never from a pickle."""
    with weights.library_errors(path, f"be opened by {kind.__name__}"):
        model, report = kind.from_pretrained(path, use_safetensors=True, output_loading_info=True)
        processor = processor.from_pretrained(path)
    if report["missing_keys"]:
        raise weights.UserError(f"{path}: tensor {min(report['missing_keys'])} is missing")
    return model.to(device).requires_grad_(False).eval(), processor
