"""Audit tiny models of many architectures: ``python tools/audit_zoo.py [--write DOC] [NAME ...]``.

Each model is built from its config with random weights, made analog, and run once under
:func:`analogfx.audit`. What was multiplied is compared with what the report says, and with what
``strict=True`` does: a *miss* is a digital product that the report does not list, a *false alarm*
is a model that ``strict`` refuses though nothing ran digitally. Exit status 1 if there is any.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import analogfx
from analogfx.audit import Audit

CONFIG = {"pre_post": {"input_range": {"enable": True}}, "forward": {"inp_res": 254}}

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "n_embd": 32, "n_layer": 2,
    "n_head": 2, "n_positions": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "image_size": 32, "patch_size": 8, "num_labels": 3, "embedding_size": 16,
    "type_vocab_size": 2, "decoder_start_token_id": 1, "ffn_dim": 48,
    "word_embed_proj_dim": 32, "state_size": 8, "time_step_rank": 4, "num_layers": 2,
    "num_heads": 2, "d_ff": 48, "d_kv": 16, "dim": 32, "hidden_dim": 48, "n_heads": 2,
    "n_layers": 2, "head_dim": 16, "rotary_dim": 8, "moe_intermediate_size": 24,
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "num_mel_bins": 16,
    "max_source_positions": 32, "max_target_positions": 64, "embed_dim": 32,
}  # fmt: skip
"""Fields that make a model tiny, where its config has them."""

IDS = torch.arange(14).view(2, 7) + 3
IMAGE = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
TEXT = {"input_ids": IDS}
PIXELS = {"pixel_values": IMAGE}
SEQ2SEQ = {"input_ids": IDS, "decoder_input_ids": IDS}
WAVE = {"input_values": torch.linspace(-1, 1, 2 * 1200).view(2, 1200)}
SPEECH_LAYERS = {
    "conv_dim": [16, 16], "conv_stride": [5, 2], "conv_kernel": [10, 3],
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0,
}  # fmt: skip
BOTH = {
    name: {**SMALL, "projection_dim": 16, "num_key_value_heads": 2}
    for name in ("text_config", "vision_config")
}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
STAGES = {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "patch_size": 2}

SSM = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8,
    "mamba_expand": 2, "mamba_chunk_size": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model and its input."""

    name: str
    make: Callable[[], nn.Module]
    inputs: dict[str, Any]


def _case(architecture: str, inputs: dict[str, Any], head: str = "Model", **fields: Any) -> Case:
    """A model of transformers' by the prefix of its classes."""

    def make() -> nn.Module:
        import transformers

        made = getattr(transformers, f"{architecture}Config")
        known = made().to_dict()
        given = {k: v() if callable(v) else v for k, v in fields.items()}
        small = {k: v for k, v in SMALL.items() if k in known and "text_config" not in known}
        built: nn.Module = getattr(transformers, f"{architecture}{head}")(made(**small | given))
        return built

    return Case(f"{architecture}{'' if head == 'Model' else head}", make, inputs)


LARGE = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)


def _resnet() -> Any:
    import transformers

    return transformers.ResNetConfig(**RESNET, out_features=["stage2"])


def _swin() -> Any:
    import transformers

    return transformers.SwinConfig(
        image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2],
        window_size=2, out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip


def cases() -> list[Case]:
    """The zoo."""
    causal = "ForCausalLM"
    return [
        # Encoders of text.
        *(
            _case(name, TEXT)
            for name in (
                "Bert", "Roberta", "Albert", "Electra", "ConvBert", "RoFormer", "MPNet",
                "DebertaV2", "Camembert", "XLMRoberta", "Ernie", "Nystromformer", "IBert",
                "ModernBert",
            )
        ),
        _case("MobileBert", TEXT, intra_bottleneck_size=16, true_hidden_size=16),
        _case("SqueezeBert", TEXT, embedding_size=32, q_groups=1, k_groups=1, v_groups=1,
              post_attention_groups=1, intermediate_groups=1, output_groups=1),
        _case("Deberta", TEXT, relative_attention=True, pos_att_type=["c2p", "p2c"]),
        _case("DistilBert", TEXT),
        _case("XLNet", TEXT, d_inner=48),
        _case("XLM", TEXT, emb_dim=32, max_position_embeddings=64, mask_index=5, unk_index=4),
        _case("Funnel", TEXT, block_sizes=[1, 1], d_head=16, d_inner=48),
        _case("Longformer", TEXT, attention_window=4, max_position_embeddings=70),
        _case("Perceiver", {"inputs": torch.linspace(-1, 1, 2 * 6 * 16).view(2, 6, 16)},
              d_model=16, d_latents=32, num_latents=4, num_blocks=1, num_self_attends_per_block=1,
              num_self_attention_heads=2, num_cross_attention_heads=2),
        # Decoders.
        _case("GPT2", TEXT, "LMHeadModel"),
        *(
            _case(name, TEXT, causal)
            for name in (
                "Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Phi", "Phi3", "Falcon",
                "GPTNeoX", "GPTJ", "OPT", "Bloom", "Mpt", "StableLm", "Starcoder2", "Cohere",
                "Olmo", "Olmo2", "Granite", "Glm", "Nemotron", "Persimmon", "GPTBigCode",
            )
        ),
        _case("CodeGen", TEXT, causal, n_head=4),
        _case("GPTNeo", TEXT, causal, attention_types=[[["global", "local"], 1]]),
        _case("Mamba", TEXT, causal),
        _case("Mamba2", TEXT, causal, num_heads=4, head_dim=16, n_groups=2, chunk_size=4),
        _case("FalconMamba", TEXT, causal),
        _case("RecurrentGemma", TEXT, causal, num_hidden_layers=3, lru_width=32, head_dim=16),
        _case("Rwkv", TEXT, causal, attention_hidden_size=32),
        _case("Lfm2", TEXT, causal, layer_types=["conv", "full_attention"]),
        _case("Jamba", TEXT, causal, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4,
              expert_layer_period=2, expert_layer_offset=1, mamba_dt_rank=4, num_experts=2),
        _case("Bamba", TEXT, causal, attn_layer_indices=[1], **SSM),
        _case("Zamba2", TEXT, causal, num_hidden_layers=3, attention_head_dim=32, chunk_size=4,
              layers_block_type=["mamba", "mamba", "hybrid"], attention_hidden_size=64,
              n_mamba_heads=4, mamba_headdim=16, mamba_ngroups=1, mamba_d_state=8),
        _case("Qwen3Next", TEXT, causal, layer_types=["linear_attention", "full_attention"],
              linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8,
              linear_value_head_dim=8, num_experts=2, num_experts_per_tok=1, head_dim=16,
              moe_intermediate_size=16, shared_expert_intermediate_size=16),
        _case("FalconH1", TEXT, causal, mamba_d_ssm=64, **SSM),
        _case("NemotronH", TEXT, causal, layers_block_type=["mamba", "attention"], head_dim=16,
              mamba_num_heads=4, mamba_head_dim=16, n_groups=1, ssm_state_size=8, chunk_size=4),
        _case("GraniteMoeHybrid", TEXT, causal, layer_types=["mamba", "attention"],
              num_local_experts=2, num_experts_per_tok=1, shared_intermediate_size=16, **SSM),
        _case("Lfm2Moe", TEXT, causal, layer_types=["conv", "full_attention"], num_experts=2,
              num_experts_per_tok=1, moe_intermediate_size=16, num_dense_layers=1),
        # Mixtures of experts.
        *(_case(name, TEXT, causal) for name in ("Mixtral", "Olmoe", "GraniteMoe", "Qwen2Moe",
                                                 "Qwen3Moe", "Phimoe")),
        _case("DeepseekV3", TEXT, causal, n_routed_experts=4, n_group=1, topk_group=1,
              q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
              v_head_dim=16, head_dim=8, first_k_dense_replace=1, num_key_value_heads=2),
        # Encoders with decoders.
        *(_case(name, SEQ2SEQ) for name in ("T5", "Bart", "MBart", "Marian", "Pegasus", "LED",
                                            "MT5", "BigBirdPegasus", "PLBart", "UMT5")),
        _case("ProphetNet", SEQ2SEQ, num_encoder_layers=2, num_decoder_layers=2,
              num_encoder_attention_heads=2, num_decoder_attention_heads=2),
        _case("Whisper", {"input_features": torch.linspace(-1, 1, 2 * 16 * 64).view(2, 16, 64),
                          "decoder_input_ids": IDS}),
        _case("Speech2Text",
              {"input_features": torch.linspace(-1, 1, 2 * 40 * 16).view(2, 40, 16),
               "decoder_input_ids": IDS}, input_feat_per_channel=16, conv_channels=32),
        # Speech.
        *(_case(name, WAVE, hidden_act="gelu", **SPEECH_LAYERS)
          for name in ("Wav2Vec2", "Hubert", "WavLM", "UniSpeech", "SEW")),
        _case("Wav2Vec2Conformer", WAVE, **SPEECH_LAYERS),
        # Images.
        *(_case(name, PIXELS) for name in ("ViT", "DeiT", "Beit", "ViTMAE", "Dinov2")),
        _case("ConvNext", PIXELS, "ForImageClassification", **STAGES),
        _case("ConvNextV2", PIXELS, "ForImageClassification", **STAGES),
        _case("ResNet", PIXELS, "ForImageClassification", **RESNET),
        _case("RegNet", PIXELS, "ForImageClassification", groups_width=8, **RESNET),
        _case("Swin", PIXELS, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4,
              patch_size=4),
        _case("Swinv2", PIXELS, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4,
              patch_size=4),
        _case("Segformer", PIXELS, "ForImageClassification", hidden_sizes=[8, 16, 16, 16],
              depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 2], decoder_hidden_size=16),
        _case("PoolFormer", PIXELS, hidden_sizes=[8, 16, 16, 16],
              depths=[1, 1, 1, 1]),
        _case("MobileViT", PIXELS, hidden_sizes=[16, 24, 32],
              neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 16], num_attention_heads=2, patch_size=2),
        _case("MobileNetV2", PIXELS, depth_multiplier=0.25, min_depth=8),
        _case("Levit", {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 64 * 64).view(2, 3, 64, 64)},
              image_size=64, patch_size=16, hidden_sizes=[16, 24, 32],
              num_attention_heads=[2, 2, 2],
              depths=[1, 1, 1], key_dim=[8, 8, 8]),
        _case("MobileNetV1", PIXELS, depth_multiplier=0.25, min_depth=8),
        _case("EfficientNet", PIXELS, width_coefficient=0.25, depth_coefficient=0.1,
              hidden_dim=320),
        _case("Detr", {"pixel_values": LARGE}, use_timm_backbone=False, backbone=None,
              use_pretrained_backbone=False, backbone_config=_resnet, num_queries=4),
        _case("Mask2Former", {"pixel_values": LARGE}, backbone=None, backbone_config=_swin,
              use_pretrained_backbone=False, hidden_dim=32, feature_size=32, mask_feature_size=32,
              num_attention_heads=2, num_queries=4, encoder_layers=1, decoder_layers=2,
              dim_feedforward=32, encoder_feedforward_dim=32),
        # Text and images.
        _case("CLIP", {**TEXT, **PIXELS}, **BOTH, projection_dim=16),
        _case("Siglip", {**TEXT, **PIXELS}, **BOTH),
        _case("GroupViT", {**TEXT, "pixel_values": IMAGE}, text_config=BOTH["text_config"],
              vision_config={"hidden_size": 32, "intermediate_size": 48, "image_size": 32,
                             "patch_size": 4, "depths": [1, 1, 1], "num_group_tokens": [8, 4, 0],
                             "num_output_groups": [8, 4, 0], "num_attention_heads": 2},
              projection_dim=16, projection_intermediate_dim=16),
    ]  # fmt: skip


def adapted() -> list[Case]:
    """Models with adapters of PEFT's, where that is installed."""
    try:
        import peft
    except ImportError as error:
        print(f"peft is skipped: {error}", file=sys.stderr)
        return []

    def make(**fields: Any) -> Callable[[], nn.Module]:
        base = _case("Llama", TEXT, "ForCausalLM").make

        def build() -> nn.Module:
            config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **fields)
            return peft.get_peft_model(base(), config)

        return build

    return [
        Case("Llama with LoRA", make(), TEXT),
        Case("Llama with rsLoRA", make(use_rslora=True), TEXT),
        Case("Llama with DoRA", make(use_dora=True), TEXT),
    ]


def torch_cases() -> list[Case]:
    """Layers of torch's own, and models of timm's and torchvision's where those are installed."""
    x = torch.linspace(-1, 1, 4 * 6 * 16).view(4, 6, 16)
    found = [
        Case("nn.TransformerEncoder", lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1), {"src": x}),
        Case("nn.LSTM", lambda: nn.LSTM(16, 12, batch_first=True), {"input": x}),
    ]  # fmt: skip
    try:
        import torchvision

        for name in ("resnet18", "mobilenet_v3_small", "swin_t", "vit_b_16"):
            found.append(
                Case(f"torchvision {name}", getattr(torchvision.models, name), {"x": IMAGE})
            )
    except ImportError as error:
        print(f"torchvision is skipped: {error}", file=sys.stderr)
    try:
        import timm

        for name in ("resnet10t", "vit_tiny_patch16_224", "mixer_s32_224"):
            image = torch.linspace(-1, 1, 3 * 224 * 224).view(1, 3, 224, 224)
            found.append(
                Case(f"timm {name}", lambda name=name: timm.create_model(name), {"x": image})
            )
    except ImportError as error:
        print(f"timm is skipped: {error}", file=sys.stderr)
    return found


@dataclass(frozen=True)
class Result:
    """What became of one model."""

    name: str
    reported: float = 0.0
    measured: float = 0.0
    missed: tuple[str, ...] = ()
    strict: str = ""
    """"passes" or "refuses"."""
    digital: int = 0
    """Products that were seen to run digitally."""
    error: str = ""
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """What is wrong, "ok" if nothing."""
        if self.error:
            return f"error: {self.error}"
        if self.missed:
            return f"MISSED {', '.join(self.missed)}"
        if self.strict == "refuses" and not self.digital:
            return "FALSE ALARM"
        return "ok"


def judge(case: Case) -> tuple[Result, Audit | None]:
    """Make one model analog, watch it run, and compare."""
    start, result = time.perf_counter(), Result(case.name)
    try:
        torch.manual_seed(0)
        digital = case.make().eval()
        with torch.no_grad():
            digital(**case.inputs)
    except Exception as error:  # the model itself does not run here
        return replace(result, error=f"digital: {type(error).__name__}: {_first(error)}"), None
    try:
        try:
            analogfx.analogize(digital, CONFIG, strict=True)
            strict = "passes"
        except analogfx.errors.PlacementError:
            strict = "refuses"
        analog = analogfx.analogize(digital, CONFIG)
        with torch.no_grad():
            seen = analogfx.audit(analog, **case.inputs)
    except Exception as error:
        return replace(result, error=f"{type(error).__name__}: {_first(error)}"), None
    misses = [row[0][0] for row in analogfx.terminal.fold([p.parameters for p in seen.missed])]
    result = replace(
        result, reported=seen.report.coverage, measured=seen.coverage, missed=tuple(misses),
        strict=strict, digital=sum(p.status == "digital" for p in seen.products),
        seconds=time.perf_counter() - start,
    )  # fmt: skip
    return result, seen


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:120]


def markdown(results: list[Result]) -> Iterator[str]:
    """The results for the documentation: a list of names, and a table of the rest."""
    whole = [r.name for r in results if r.measured == 1.0 and r.verdict == "ok"]
    yield f"Analog as a whole, which the report says, too ({len(whole)}): {', '.join(whole)}."
    yield ""
    yield "| model | coverage by the report | as measured | `strict=True` | outcome |"
    yield "|---|---|---|---|---|"
    for r in results:
        if r.name not in whole:
            outcome = "every digital product is listed" if r.verdict == "ok" else r.verdict
            yield f"| {r.name} | {r.reported:.4f} | {r.measured:.4f} | {r.strict} | {outcome} |"


def main() -> int:
    """Run the chosen cases, and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="the models; all without a name")
    parser.add_argument("--write", type=Path, metavar="FILE", help="where the table goes")
    parser.add_argument("-v", "--verbose", action="store_true", help="print reports and audits")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    results = []
    for case in cases() + adapted() + torch_cases():
        if arguments.names and case.name not in arguments.names:
            continue
        result, seen = judge(case)
        results.append(result)
        print(f"{result.name:32} {result.reported:.4f} {result.measured:.4f} {result.strict:8}"
              f" {result.seconds:5.1f} s  {result.verdict}", flush=True)  # fmt: skip
        if arguments.verbose and seen is not None:
            print(seen.report.text(), seen.text(), sep="\n")
    right = sum(r.verdict == "ok" for r in results)
    print(f"{right} of {len(results)} without a miss or a false alarm")
    if arguments.write:
        arguments.write.write_text("\n".join(markdown(results)) + "\n")
    return 0 if right == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
