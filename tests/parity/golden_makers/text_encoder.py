"""The UMT5 encoder: transformers' UMT5EncoderModel."""

import torch
from transformers import UMT5Config, UMT5EncoderModel

from .common import fill, must_matter, rng, round_to_bf16

SOURCE = "transformers UMT5EncoderModel"


def make_model(vocab_size):
    config = UMT5Config(
        vocab_size=vocab_size, d_model=48, d_kv=16, d_ff=80, num_layers=2, num_heads=3,
        relative_attention_num_buckets=32, relative_attention_max_distance=128,
        dropout_rate=0.0, layer_norm_epsilon=1e-6, feed_forward_proj="gated-gelu",
        is_encoder_decoder=False, tie_word_embeddings=True)
    return round_to_bf16(fill(UMT5EncoderModel(config), 11, gain=0.7))


def run(model, ids, mask):
    with torch.no_grad():
        out = model(ids, mask).last_hidden_state
    return out * mask[..., None]  # the pipelines zero the rows behind the mask


def make_inputs(vocab_size, lengths, total):
    ids = torch.zeros(len(lengths), total, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for b, n in enumerate(lengths):
        ids[b, : n - 1] = torch.from_numpy(rng(12, f"ids{b}").integers(3, vocab_size, n - 1))
        ids[b, n - 1] = 1
        mask[b, :n] = 1
    return ids, mask


def write(goldens, case, model, ids, mask, folder_name):
    golden = run(model, ids, mask)
    outputs = {"last_hidden_state": golden,
               "last_hidden_state_bf16": run(model.bfloat16(), ids, mask)}
    model.float()
    goldens.write(case, ["text_encoder"], {"input_ids": ids, "attention_mask": mask}, outputs,
                  folder_name, SOURCE)
    return golden


def mutations(model, ids, mask, golden):
    block = model.encoder.block[1].layer[0]
    for what, p in (("the second layer's own position table",
                     block.SelfAttention.relative_attention_bias.weight),
                    ("a norm's weight", block.layer_norm.weight),
                    ("the final norm's weight", model.encoder.final_layer_norm.weight)):
        kept = p.detach().clone()
        with torch.no_grad():
            if "table" in what:
                p.copy_(model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight)
            else:
                p.fill_(1)
            must_matter(what, run(model, ids, mask), golden)
            p.copy_(kept)


def make(goldens, vocab_size):
    model = make_model(vocab_size)
    folder = goldens.model("odd") / "text_encoder"
    model.bfloat16().save_pretrained(folder)
    model.float()
    # 150 tokens reach every bucket of the relative positions, the last one (91 and more) included.
    ids, mask = make_inputs(vocab_size, [150, 5], 160)
    golden = write(goldens, "text_encoder", model, ids, mask, "odd")
    mutations(model, ids, mask, golden)


def make_demo(goldens, demo):
    model = UMT5EncoderModel.from_pretrained(demo / "text_encoder", dtype=torch.float32).eval()
    # Several prompts: of few rows the worst element, which the bf16 rule compares, is a matter of luck.
    ids, mask = make_inputs(model.config.vocab_size, [6, 12, 18, 24], 24)
    write(goldens, "demo_text_encoder", model, ids, mask, "demo")
