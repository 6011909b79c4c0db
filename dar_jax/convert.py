"""Converts weights: python -m dar_jax.convert --kind=sit --input=SiT-XL-2-256x256.pt --output=runs/sit_xl

sit: --input is a PyTorch state dict under the official names of willisma/SiT, bare or in a training checkpoint (its
EMA is taken), or the same arrays as .npz. --output becomes a workdir: config.json and the weights as the EMA of step 0.
dar_jax.sample draws from it; dar_jax.main starts from it, also with routing, by --config.init_from=runs/sit_xl.

inception: --input is pt_inception-2015-12-05-6726825d.pth from the releases of pytorch-fid, and --output an .npz for
dar_jax.evaluate --inception and config.eval.inception.

vae: --input is diffusion_pytorch_model.safetensors of stabilityai/sd-vae-ft-ema or -mse, or that of the folder vae of
Qwen/Qwen-Image, and --output a directory for dar_jax.prepare --vae, dar_jax.sample --vae and config.data.vae. The names
of the tensors tell which it is. Of Qwen-Image's, the directory keeps what encodes and decodes single images.

qwen_image: --input is the folder transformer of Qwen/Qwen-Image with its index and shards, the index, or one
.safetensors. --output becomes a workdir, as of sit, whose weights have the dtype of the tensors (bfloat16). Both are
larger than memory, and pass through it tensor by tensor. If it was killed, the same command goes on. With --export the
way is back: --input is the workdir of a residual MM-DiT, and --output a directory of shards and their index under the
published names, in the dtype of the checkpoint. Copy the published config.json beside them for diffusers.

dinov2, dinov3: --input is model.safetensors of facebook/dinov2-base, facebook/dinov2-with-registers-base or
facebook/dinov3-vitb16-pretrain-lvd1689m (or of another size S, B or L), or Meta's own .pth of the same. --output is a
directory for representation alignment.

lora: the adapters of a run with config.lora. With --workdir, --output is a directory that receives
pytorch_lora_weights.safetensors, which diffusers reads, and routing.safetensors if the model is routed. The way back:
--input is such a directory, or a .safetensors file of diffusers, peft, ComfyUI or kohya, --base the workdir of the
weights that they adapt, and --output a workdir.

merged: --workdir is a run with config.lora, and --output a workdir of the same model without adapters.
"""

from absl import flags

from dar_jax import cli, errors, files

KIND = flags.DEFINE_string(
    "kind",
    None,
    "What the weights are: sit (residual, any size) | qwen_image (residual MM-DiT) | inception (of FID) | vae (f8) | "
    "dinov2, dinov3 (ViT-S, B, L) | lora (adapters of a run) | merged (a run and its adapters)",
)
INPUT = flags.DEFINE_string(
    "input",
    None,
    "A .pt, .pth, .npz or .safetensors file of weights; qwen_image: also a folder of shards, and a workdir to export",
)
OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "sit, qwen_image, merged, lora of an --input: the workdir to write, without checkpoints; inception: an .npz; vae, "
    "dinov2, dinov3, lora of a --workdir: a directory",
)
WORKDIR = flags.DEFINE_string("workdir", None, "lora, merged: a run with config.lora")
BASE = flags.DEFINE_string("base", None, "lora of an --input: the workdir of the weights that are adapted")
EXPORT = flags.DEFINE_bool("export", False, "qwen_image: from a workdir to shards under the published names")
NUM_HEADS = flags.DEFINE_integer("num_heads", None, "sit: attention heads; default: those of the published size")


def main(_):
    cli.require_flags(kind=KIND.value, output=OUTPUT.value)
    kinds = ("sit", "qwen_image", "inception", "vae", "dinov2", "dinov3", "lora", "merged")
    errors.check_choice("--kind", KIND.value, kinds)
    is_qwen = KIND.value == "qwen_image"
    errors.require(is_qwen or not EXPORT.value, f"--export is of no use to --kind={KIND.value}; leave it out.")
    if KIND.value in ("lora", "merged"):
        _convert_adapters()
        return
    cli.require_flags(input=INPUT.value)
    if KIND.value == "inception":
        files.check_output(OUTPUT.value, "--output", ".npz")
    else:
        files.check_directory(OUTPUT.value, "--output")
    if is_qwen:
        return _convert_qwen_image()
    from dar_jax.pretrained.state_dict import read_state_dict

    state_dict = read_state_dict(INPUT.value)
    if KIND.value == "sit":
        _convert_sit(state_dict)
    elif KIND.value == "inception":
        from dar_jax.pretrained import inception

        inception.write_params(OUTPUT.value, inception.params_from_torch(state_dict))
        print(f"wrote {OUTPUT.value}: the FID Inception network")
    elif KIND.value == "vae":
        from dar_jax.pretrained import vae

        converted = vae.from_torch(state_dict)
        vae.write(OUTPUT.value, converted)
        model = converted.model
        print(f"wrote {OUTPUT.value}: {type(model).__name__}, f{model.factor}, fingerprint {converted.fingerprint}")
    else:
        _convert_dino(state_dict)


def _convert_adapters() -> None:
    errors.require(
        bool(WORKDIR.value) != bool(INPUT.value),
        "give --workdir, the run whose adapters are written, or --input, adapters to make a workdir of.",
    )
    if KIND.value == "merged" or WORKDIR.value:
        cli.require_flags(workdir=WORKDIR.value)
    else:
        cli.require_flags(base=BASE.value)
    files.check_directory(OUTPUT.value, "--output")
    from dar_jax import adapters

    if KIND.value == "merged":
        adapters.merge(WORKDIR.value, OUTPUT.value)
        print(f"wrote {OUTPUT.value}: the weights of {WORKDIR.value} with their adapters merged")
    elif WORKDIR.value:
        for path in adapters.export(WORKDIR.value, OUTPUT.value):
            print(f"wrote {path}")
    else:
        config = adapters.load(INPUT.value, BASE.value, OUTPUT.value)
        print(f"wrote {OUTPUT.value}: adapters of rank {config.lora.rank} on {BASE.value}")


def _convert_dino(state_dict: dict) -> None:
    from dar_jax.pretrained import dino_weights

    converted = dino_weights.from_torch(state_dict)
    model, kind = converted.model, f"dinov{converted.model.version}"
    errors.require(kind == KIND.value, f"--kind = {KIND.value}: the weights are those of {kind}; set --kind={kind}.")
    dino_weights.write(OUTPUT.value, converted)
    print(
        f"wrote {OUTPUT.value}: DINOv{model.version} of {model.depth} blocks x {model.hidden_size}, {model.num_heads} "
        f"heads, patch {model.patch_size}, {model.num_registers} registers, fingerprint {converted.fingerprint}"
    )


def _convert_sit(state_dict: dict) -> None:
    from dar_jax import config as config_lib
    from dar_jax.checkpoint import write_weights
    from dar_jax.pretrained import sit
    from dar_jax.validate import validate

    config = config_lib.default()
    config.model.update(sit.infer_model(state_dict, NUM_HEADS.value), space="latents")
    config.model.routing.kind = "residual"
    config.data.update(source="synthetic", image_size=config.model.input_size)  # the weights do not tell their data
    config.eval.batch_size = 64
    validate(config)
    write_weights(OUTPUT.value, config, sit.params_from_torch(state_dict))
    model = config.model
    print(
        f"wrote {OUTPUT.value}: SiT of {model.depth} blocks x {model.hidden_size}, {model.num_heads} heads, patch "
        f"{model.patch_size}, {model.input_size}x{model.input_size}x{model.channels}, {model.num_classes} classes, "
        f"learn_sigma = {model.learn_sigma}"
    )


def _convert_qwen_image() -> None:
    from dar_jax import mmdit_weights, streaming

    if EXPORT.value:
        count, step = mmdit_weights.export(INPUT.value, OUTPUT.value)
        print(f"wrote {OUTPUT.value}: {count:,} tensors of step {step}")
        return
    fields, parts, source = mmdit_weights.find_parts(INPUT.value)
    streaming.write_weights(OUTPUT.value, _qwen_config(fields), parts, source)
    print(
        f"wrote {OUTPUT.value}: MM-DiT of {fields['depth']} blocks x {fields['hidden_size']}, {fields['num_heads']} "
        f"heads, patch {fields['patch_size']}, {fields['channels']} channels, text of {fields['text_size']}"
    )


def _qwen_config(fields: dict[str, int]):
    """The config of a workdir with these fields of `qwen_image.infer_model`."""
    from dar_jax import config as config_lib

    config = config_lib.default()
    with config.unlocked():
        config.model.update(fields, family="mmdit", text="embeddings", text_length=512)
        config.model.update(space="latents", input_size=128)  # 1024x1024 pixels
    config.model.routing.kind = "residual"
    config.data.source = "synthetic"  # the weights do not tell their data
    return config


if __name__ == "__main__":
    cli.run(main)
