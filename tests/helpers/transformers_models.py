"""Tiny networks of Hugging Face `transformers` with random weights: code of third parties."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import torch
import transformers
from torch import nn

from branchynet import Policy, attach, load
from branchynet.deploy.assembly import assemble
from branchynet.deploy.staged_writing import save_stages
from branchynet.deploy.torch_engine import TorchEngine
from branchynet.graph.onnx_flat import flatten
from branchynet.policy import scores
from helpers.loop import every_exit, figure_2, safe_thresholds
from helpers.networks import spread_out
from helpers.onnx_graphs import check_work, profile

CLASSES = 5
SAMPLES = 41
ALWAYS = 3e38


def images(size=32, frames=()):
    return lambda rows: {"pixel_values": torch.rand(rows, *frames, 3, size, size)}


def sound(*shape, name="input_values"):
    return lambda rows: {name: torch.randn(rows, *shape)}


def words(rows, length=9):
    """Token ids with padding at the end of every third row, and the attention mask."""
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[::3, 6:] = 0
    return {"input_ids": torch.randint(5, 50, (rows, length)) * mask, "attention_mask": mask}


@dataclass(frozen=True)
class Case:
    """A model class, its configuration, its inputs, and the names of two of its submodules."""

    model: str
    settings: dict
    inputs: object
    at: tuple[str, str]
    options: dict = field(default_factory=dict)

    def __str__(self):
        return self.model

    def backbone(self):
        model = getattr(transformers, self.model)
        settings = {"num_labels": CLASSES, **self.settings}
        return model(model.config_class(**settings)).eval()


BLOCKS = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
PATCHES = {**BLOCKS, "image_size": 32, "patch_size": 8}
TEXT = {**BLOCKS, "vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
STAGES = {"hidden_sizes": [8, 16, 16, 24], "depths": [1, 1, 1, 1]}
WAVES = {
    **BLOCKS, "conv_dim": [8, 8], "conv_kernel": [10, 3], "conv_stride": [5, 2], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8, "vocab_size": 32,
}  # fmt: skip
WINDOWS = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 2], "num_heads": [2, 2], "window_size": 4}


def layers(path, *numbers):
    return tuple(f"{path}.{n}" for n in numbers or (0, 1))


VISION = [
    Case("ResNetForImageClassification", {**STAGES, "embedding_size": 8, "layer_type": "basic"}, images(),
         layers("resnet.encoder.stages", 0, 2)),
    Case("RegNetForImageClassification", {**STAGES, "embedding_size": 8, "groups_width": 8}, images(),
         layers("regnet.encoder.stages", 0, 2)),
    Case("ConvNextForImageClassification", STAGES, images(), layers("convnext.encoder.stages", 0, 2)),
    Case("ConvNextV2ForImageClassification", STAGES, images(), layers("convnextv2.encoder.stages", 0, 2)),
    Case("MobileNetV1ForImageClassification", {"depth_multiplier": 0.25, "image_size": 32}, images(),
         layers("mobilenet_v1.layer", 4, 14)),
    Case("MobileNetV2ForImageClassification", {"depth_multiplier": 0.25, "image_size": 32}, images(),
         layers("mobilenet_v2.layer", 3, 9)),
    Case("EfficientNetForImageClassification",
         {"width_coefficient": 0.25, "depth_coefficient": 0.1, "image_size": 32, "hidden_dim": 320}, images(),
         layers("efficientnet.encoder.blocks", 1, 4)),
    Case("BitForImageClassification",
         {"embedding_size": 8, "hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1], "num_groups": 4}, images(),
         layers("bit.encoder.stages", 0, 2)),
    Case("PoolFormerForImageClassification", STAGES, images(64), layers("poolformer.encoder.block", "0.0", "2.0")),
    Case("ViTForImageClassification", PATCHES, images(), layers("vit.layers")),
    Case("DeiTForImageClassification", PATCHES, images(), layers("deit.layers")),
    Case("DeiTForImageClassificationWithTeacher", PATCHES, images(), layers("deit.layers"),
         {"output": lambda out: out.logits}),  # it also returns the logits of both heads
    Case(
        "BeitForImageClassification", {**PATCHES, "use_relative_position_bias": True}, images(), layers("beit.layers")
    ),
    Case("Dinov2ForImageClassification", PATCHES, images(), layers("dinov2.encoder.layer")),
    Case("LevitForImageClassification",
         {"image_size": 32, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1],
          "key_dim": [8, 8, 8]}, images(), layers("levit.encoder.stages")),
    Case("CvtForImageClassification",
         {"embed_dim": [8, 16, 16], "num_heads": [1, 2, 2], "depth": [1, 2, 3], "drop_path_rate": [0.0, 0.0, 0.0]},
         images(), layers("cvt.encoder.stages")),
    Case("SwinForImageClassification", WINDOWS, images(), layers("swin.encoder.layers", "0", "1.blocks.0")),
    Case("Swinv2ForImageClassification", WINDOWS, images(), layers("swinv2.encoder.layers", "0", "1.blocks.0")),
    Case("SegformerForImageClassification", {**STAGES, "num_attention_heads": [1, 2, 2, 4]}, images(64),
         layers("segformer.stages", 0, 2)),
    Case("PvtForImageClassification", {**STAGES, "num_attention_heads": [1, 2, 2, 4], "image_size": 32}, images(),
         layers("pvt.encoder.block", "0.0", "2.0")),
    Case("MobileViTForImageClassification",
         {"hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8, 8, 8, 16, 16, 16, 32], "image_size": 32,
          "num_attention_heads": 2}, images(), layers("mobilevit.encoder.layer", 0, 2)),
    Case("FocalNetForImageClassification",
         {"image_size": 32, "embed_dim": 8, "depths": [1, 1, 1], "focal_levels": [1, 1, 1], "focal_windows": [3, 3, 3]},
         images(), layers("focalnet.encoder.stages")),
    Case("HieraForImageClassification",
         {"embed_dim": 8, "image_size": [64, 64], "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}, images(64),
         layers("hiera.encoder.stages")),
    Case("SwiftFormerForImageClassification", {"image_size": 32, "depths": [1] * 4, "embed_dims": [8, 16, 16, 16]},
         images(), layers("swiftformer.encoder.network", 0, 2)),
]  # fmt: skip

SEQUENCES = [
    Case("BertForSequenceClassification", TEXT, words, layers("bert.encoder.layer")),
    Case("DistilBertForSequenceClassification",
         {"dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 32, "vocab_size": 50}, words,
         layers("distilbert.transformer.layer")),
    Case("RobertaForSequenceClassification", {**TEXT, "max_position_embeddings": 20}, words,
         layers("roberta.encoder.layer")),
    Case("AlbertForSequenceClassification", {**TEXT, "embedding_size": 8, "num_hidden_groups": 3}, words,
         layers("albert.encoder.albert_layer_groups")),
    Case("ElectraForSequenceClassification", {**TEXT, "embedding_size": 8}, words, layers("electra.encoder.layer")),
    Case("MPNetForSequenceClassification", TEXT, words, layers("mpnet.encoder.layer")),
    Case("DebertaV2ForSequenceClassification",
         {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, words, layers("deberta.encoder.layer")),
    Case("ModernBertForSequenceClassification", {**TEXT, "cls_token_id": 1, "sep_token_id": 2}, words,
         layers("model.layers")),
    Case("GPT2ForSequenceClassification",
         {"n_embd": 16, "n_layer": 3, "n_head": 2, "vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1,
          "eos_token_id": 2}, words, layers("transformer.h")),
    Case("LlamaForSequenceClassification", {**TEXT, "num_key_value_heads": 1}, words, layers("model.layers")),
    # Its hidden states are (length, batch, width)
    Case("XLNetForSequenceClassification", {"d_model": 16, "n_layer": 3, "n_head": 2, "d_inner": 32, "vocab_size": 50},
         words, layers("transformer.layer"),
         {"tap": {f"transformer.layer.{n}": lambda output: output[0].transpose(0, 1) for n in (0, 1)}}),
    Case("ASTForAudioClassification",
         {**BLOCKS, "patch_size": 8, "frequency_stride": 8, "time_stride": 8, "max_length": 32, "num_mel_bins": 16},
         sound(32, 16), layers("audio_spectrogram_transformer.layers")),
    Case("Wav2Vec2ForSequenceClassification", WAVES, sound(400),
         ("wav2vec2.feature_extractor.conv_layers.0", "wav2vec2.encoder.layers.1")),
    Case("HubertForSequenceClassification", WAVES, sound(400), layers("hubert.encoder.layers")),
    Case("WhisperForAudioClassification",
         {"d_model": 16, "encoder_layers": 3, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_layers": 1,
          "decoder_attention_heads": 2, "num_mel_bins": 8, "max_source_positions": 16, "vocab_size": 50,
          "classifier_proj_size": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
          "decoder_start_token_id": 1}, sound(8, 32, name="input_features"), layers("encoder.layers")),
    Case("VideoMAEForVideoClassification", {**PATCHES, "num_frames": 4, "tubelet_size": 2, "image_size": 16},
         images(16, (4,)), layers("videomae.encoder.layer")),
    Case("PatchTSTForClassification",
         {"num_input_channels": 2, "context_length": 32, "patch_length": 8, "patch_stride": 8, "d_model": 16,
          "num_hidden_layers": 3, "num_attention_heads": 2, "ffn_dim": 32, "num_targets": CLASSES,
          "use_cls_token": True},
         sound(32, 2, name="past_values"), layers("model.encoder.layers")),
]  # fmt: skip


def enliven(net, inputs):
    """Set weights and batch norms so that outputs differ between inputs, unlike in untrained networks."""
    calibrate(net, inputs)
    spread_out(net, inputs)


@torch.no_grad()
def calibrate(net, inputs):
    """Set weights and batch norms so that features neither vanish nor grow from layer to layer."""
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for module in net.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_normal_(module.weight)
    for norm in norms:
        nn.init.ones_(norm.weight)
        norm.momentum = 1.0
        norm.train()
    net(**inputs)
    net.eval()


def check(case, folder):
    """Two branches on unchanged model code: the file agrees with the naive loop and does no needless work."""
    torch.manual_seed(0)
    backbone = case.backbone()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    inputs = case.inputs(SAMPLES)
    net = attach(backbone, case.at, example=inputs, **case.options).eval()
    assert net.taps == case.at
    assert all(value.equal(before[name]) for name, value in backbone.state_dict().items())
    enliven(net, inputs)
    outputs = every_exit(net, inputs)
    thresholds = safe_thresholds(outputs, (0.4, 0.5))
    expected = [figure_2(sample, thresholds) for sample in outputs]
    exits, logits = np.array([n for n, _ in expected]), np.stack([z for _, z in expected])
    assert set(exits) == {1, 2, 3}

    flat = flatten(net, inputs, score=scores.entropy)
    path = folder / "model.onnx"
    policy = Policy(thresholds=thresholds)
    ir.save(assemble(flat, policy), path)
    arrays = [i.numpy() for i in inputs.values()]
    (folder / "stages").mkdir()
    save_stages(folder / "stages", flat, policy)
    for engine in (load(path, threads=1), load(folder / "stages", threads=1), TorchEngine(net, policy, inputs)):
        for batch in (1, 7, SAMPLES):
            for start in range(0, SAMPLES if batch > 1 else 8, batch):
                rows = slice(start, start + batch)
                answer = engine(*(a[rows] for a in arrays))
                assert answer.exit.tolist() == exits[rows].tolist()
                np.testing.assert_allclose(answer.output, logits[rows], atol=2e-4 * max(1, np.abs(logits).max()))

    feeds = {v.name: a for v, a in zip(flat.model.graph.inputs, arrays, strict=True)}
    results, events = profile(path, feeds, folder)
    assert results["exit"].tolist() == exits.tolist()
    check_work(flat, events, (1, 2, 3), exits)
    now = {f"threshold_{n}": np.array([ALWAYS], np.float32) for n in (1, 2)}
    results, events = profile(path, feeds | now, folder)
    assert (results["exit"] == 1).all()
    check_work(flat, events, (1, 2, 3), results["exit"])
    levels = Counter(e["name"].rpartition("/")[2] for e in events if "/" in e["name"])
    assert not set(levels) & {"3"}
