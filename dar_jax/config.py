"""Every choice an experimenter has, with its meaning, default and range. A file in configs/ changes some of them.

A config with a key that is not here is an error that names the near miss. Which words a field may hold, and which
fields suit each other, is checked by the package that reads them, and by `dar_jax.validate` for all of them.
"""

from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dar_jax.errors import UserError, check_choice, check_number, near_miss

# The published sizes of SiT: config.model.update(**SIZES["XL"]).
SIZES = {
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
}

# Variants that are no DAR, to compare it with (docs/rivals.md).
RIVALS = ("long_skip", "hyper", "identity_hyper", "mhc", "dense_former", "delta")
VARIANTS = ("residual", "uniform", "shared", "static", "static_t", "gated_t", "dynamic", *RIVALS)

# config.mesh by hardware (TPU slices, hosts of 8 GPUs), in any number: the fsdp that leaves room beside the 11 GB which
# weights, EMA and optimizer of XL/2 take. All other devices are along the data axis.
MESHES = {"v4": {"fsdp": 8}, "v5e": {"fsdp": 16}, "v5p": {"fsdp": 4}, "v6e": {"fsdp": 16}, "gpu8": {"fsdp": 8}}

# What every addition "dmd" to a variant sets: a student takes no null condition and is no velocity.
DMD = {"algorithm": "dmd", "model.label_dropout": 0.0, "eval.loss_images": 0, "optimizer.warmup_steps": 0}


class Number(NamedTuple):
    """A number of the schema: its default, and the interval that `errors.check_number` holds it to."""

    default: int | float
    interval: str


def default() -> ConfigDict:
    """Returns the locked config of all fields. Sizes are for 8x8 digits; experiments override what they mean."""
    return _take_defaults(schema()).lock()


def _take_defaults(section: ConfigDict) -> ConfigDict:
    """Puts its default in place of every `Number`. The order of the fields stays."""
    with section.ignore_type():
        for name, field in section.items():
            if isinstance(field, ConfigDict):
                _take_defaults(field)
            elif isinstance(field, Number):
                section[name] = field.default
    return section


def schema() -> ConfigDict:
    """Returns all fields with their defaults; those of numbers are a `Number`."""
    config = ConfigDict()
    config.seed = Number(0, f"[0, {2**32})")  # parameters, data order, noise: everything random follows from it
    config.algorithm = "flow"  # flow (config.diffusion, with config.repa) | dmd (distils config.teacher)
    config.teacher = ""  # dmd: workdir of the teacher, whose EMA weights the student starts from
    config.init_from = ""  # workdir whose EMA weights to start from: of the same model, or residual to any routing

    config.data = data = ConfigDict()
    # digits | idx | folder (a sub folder per class) | captions (metadata.jsonl and images) | tfds | emoji |
    # latents (prepared) | synthetic (random latents)
    data.source = "digits"
    data.path = ""  # idx, folder, captions and latents: the directory; tfds: data_dir ("" = the tfds default)
    data.name = ""  # tfds: the data set, e.g. "imagenet2012"
    data.train_split = "train"
    data.eval_split = "test"  # held-out images, the reference of the metrics unless eval.reference is given
    data.image_size = Number(8, "[1, 65536]")  # height = width: pixels after crop, or latents
    # Sizes of training images instead of image_size, ("512x512", "448x576"): height x width in pixels before a VAE. An
    # image goes to the nearest ratio, a batch holds one size. Samples and held-out images are squares of image_size.
    data.buckets = ()
    data.flip = False  # random horizontal flip in training
    data.vae = ""  # directory of a VAE: decodes latent samples, and encodes images for a model of latents; "" = none
    data.text_encoder = ""  # directory of the text encoder, which encodes the prompts of dar_jax.sample; "" = none
    data.verify = True  # latents: compare the checksums of all shards before training
    data.num_workers = Number(0, "[0, 1024]")  # grain worker processes; 0 reads in the training process

    config.model = model = ConfigDict()
    model.input_size = Number(8, "[1, 65536]")  # height = width of the tensor the model sees: pixels or latents
    model.family = "sit"  # sit (class labels) | mmdit (captions)
    model.space = "pixels"  # what x1 is: pixels | latents (of data.vae)
    model.channels = Number(1, "[1, 65536]")
    model.num_classes = Number(10, "[1, 10000000]")  # the null label of guidance is num_classes
    model.patch_size = Number(2, "[1, 65536]")
    model.hidden_size = Number(128, "[4, 65536]")
    model.depth = Number(6, "[1, 1000]")  # blocks; a block is two sublayers, attention and MLP
    model.num_heads = Number(4, "[1, 65536]")
    model.mlp_ratio = Number(4.0, "(0, 1000]")  # sit
    model.learn_sigma = False  # sit, official checkpoints: twice the output channels, the first half is used
    model.label_dropout = Number(0.1, "[0, 1)")  # probability of training on the null label, or the empty caption
    model.text = "words"  # mmdit: words (of the captions, learned along) | embeddings (of a frozen encoder, prepared)
    model.words = ()  # words: the vocabulary; a run takes that of its training captions
    model.text_encoder = ""  # embeddings: the fingerprint of their encoder; a run takes that of its training data
    model.text_length = Number(16, "[1, 4096]")  # mmdit: words or tokens of a caption, at most
    model.text_size = Number(128, "[4, 65536]")  # mmdit: features of a word, or of the embedding of a token
    model.text_depth = Number(2, "[0, 100]")  # words: blocks of the transformer that encodes them
    model.dtype = "float32"  # computation: float32 | bfloat16; parameters are always float32
    model.remat = (
        "dense"  # kept for backward: dense (outputs of dense layers) | block (inputs of blocks, routed: chunks)
    )

    model.routing = routing = ConfigDict()
    # residual | dar | long_skip | hyper | identity_hyper | mhc | dense_former | delta (docs/rivals.md)
    routing.kind = "dar"
    # uniform (nothing is learned) | shared (one for all depths) | static | static_t | gated_t | dynamic
    routing.query = "static_t"
    routing.chunk_size = Number(4, "[1, 2000]")  # sublayers per chunk, S: 1 (dense) or an even divisor of 2 * depth
    routing.summary = "last"  # a chunk's summary: last (the paper) | sum (Attention Residuals)
    routing.streams = "image"  # mmdit, which streams are routed: image | both; the other one stays residual
    routing.final = "dedicated"  # the head's aggregator: dedicated | shared (with the last MLP) | summaries
    routing.lanes = Number(4, "[2, 16]")  # hyper, identity_hyper and mhc: residual streams side by side
    routing.implementation = "auto"  # auto (kernels on TPU and GPU) | xla | pallas; all compute the same

    config.diffusion = diffusion = ConfigDict()
    diffusion.interpolant = "linear"  # linear | gvp | vp
    diffusion.prediction = "velocity"  # velocity | score | noise | x (the data)
    diffusion.weighting = "none"  # none | velocity | likelihood; ignored for velocity and x
    diffusion.time = "uniform"  # uniform | logit_normal | shifted (as a shifted sampler.schedule)
    diffusion.time_mean = Number(0.0, "[-10, 10]")  # logit_normal: mean of logit(t)
    diffusion.time_std = Number(1.0, "(0, 10]")  # logit_normal: standard deviation of logit(t)
    # shifted: t = 1 - shift s / (1 + (shift - 1) s) of uniform s; above 1: more noise. diffusers' trainer takes 3.
    diffusion.time_shift = Number(3.0, "(0, 1000]")

    config.repa = repa = ConfigDict()  # representation alignment: a state of the model is drawn to features of x1
    repa.target = "none"  # none | encoder | hog (oriented gradients) | latents (x1 itself) | later_block (of the model)
    repa.coefficient = Number(0.5, "[0, inf)")  # factor of its loss
    repa.stop_step = Number(0, "[0, inf)")  # the alignment ends after so many steps; 0 = never
    repa.block = Number(8, "[1, 1000]")  # the state behind this block is aligned; REPA: 8, SiT-B 4
    repa.later_block = Number(16, "[1, 1000]")  # later_block: the state behind this block is the target
    repa.projector = "mlp"  # mlp (REPA) | conv (3x3 on the grid of tokens, iREPA); later_block needs none
    repa.standardize = False  # targets are standardised over the tokens of an image (iREPA)
    repa.mean_share = Number(1.0, "[0, 1]")  # standardize: the share of the mean that is subtracted
    repa.encoder = "dinov2_b"  # dinov2_s|b|l, dinov2_s_reg|b_reg|l_reg (with registers), dinov3_s|b
    repa.weights = ""  # encoder: directory of its weights, which dar_jax.convert has made
    repa.dtype = "bfloat16"  # encoder: computation, float32 | bfloat16

    config.lora = lora = ConfigDict()  # low-rank adapters and routing are trained on the frozen weights of init_from
    lora.rank = Number(0, "[0, 65536]")  # 0 = off: all weights are trained
    lora.alpha = Number(0.0, "[0, inf)")  # the adapter's scale is alpha / rank; 0 = rank
    lora.targets = ()  # regular expressions of whole paths of kernels; () = attention and MLP (models/lora.py)
    lora.dtype = "bfloat16"  # of the frozen weights in memory: float32 | bfloat16
    lora.base = ""  # written by the run: step and SHA-256 of the checkpoint of init_from that is the base

    config.dmd = dmd = ConfigDict()  # a student of a few steps, by distribution matching (docs/distil.md)
    dmd.num_steps = Number(4, "[1, 128]")  # of the student, in training and sampling alike
    dmd.shift = Number(1.0, "(0, 1000]")  # of the student's times, as diffusion.time_shift; 1 = evenly spaced
    dmd.simulation = "stochastic"  # between two steps: stochastic (fresh noise) | ode (the noise that is left)
    dmd.guidance = Number(1.0, "(-inf, inf)")  # uncond + guidance * (cond - uncond) of the teacher; 1 = none
    dmd.guidance_rescale = False  # as sampler.cfg_rescale
    dmd.decoupled = False  # guidance is measured at noises of its own, above the level that the step goes to
    dmd.renoise = "uniform"  # noise levels of the comparison: uniform | beta (noisier at first: Beta(4, 1.5))
    dmd.renoise_shift = Number(1.0, "(0, 1000]")  # of these levels
    dmd.renoise_range = (0.02, 0.98)  # of these levels: 0 data, 1 noise
    dmd.anneal_steps = Number(10_000, "[1, inf)")  # until beta is uniform, and real_scale is 0
    dmd.fake_updates = Number(5, "[1, 1000]")  # of the fake score for each of the student
    dmd.fake_learning_rate = Number(1e-4, "[0, inf)")
    dmd.fake_rank = Number(0, "[0, 65536]")  # the fake score: adapters of this rank on the teacher; 0 = a full copy
    dmd.real_scale = Number(0.0, "[0, 1]")  # fake_rank: share of the fake's adapters in the real score at the start
    dmd.weights = ""  # written by the run: step and SHA-256 of the checkpoint of teacher

    config.sampler = sampler = ConfigDict()
    sampler.method = "heun"  # ODE: euler | heun | dopri5; SDE: sde_euler | sde_heun
    sampler.num_steps = Number(50, "[1, inf)")  # of the fixed-step solvers; includes the last step of the SDE
    sampler.schedule = "uniform"  # steps of euler and heun: uniform | shifted (shorter near the noise, Qwen-Image)
    sampler.shift = Number(0.0, "[0, 1000]")  # shifted: s = 1 - t becomes shift s / (1 + (shift - 1) s), 0 = by tokens
    sampler.terminal_s = Number(0.0, "[0, 1)")  # shifted: stretches s so that the last step starts here; 0 = does not
    sampler.atol = Number(1e-6, "[1e-12, 1]")  # dopri5
    sampler.rtol = Number(1e-3, "[1e-12, 1]")  # dopri5
    sampler.diffusion_form = "sigma"  # SDE: constant|sbdm|sigma|linear|decreasing|increasing_decreasing
    sampler.diffusion_norm = Number(1.0, "[0, inf)")  # SDE: factor of the form
    sampler.last_step = "mean"  # SDE: none | mean | tweedie | euler
    sampler.last_step_size = Number(0.04, "(0, 1)")  # SDE
    sampler.cfg_scale = Number(1.0, "(-inf, inf)")  # 1 = no guidance
    sampler.cfg_channels = Number(0, "[0, 65536]")  # guided channels, 0 = all; official SiT guides the first 3 of 4
    sampler.cfg_interval = (0.0, 1.0)  # guidance acts for t in this range (t = 0 noise, 1 data)
    sampler.cfg_rescale = False  # each guided token keeps the norm of its conditional prediction (Qwen-Image)

    config.optimizer = optimizer = ConfigDict()
    optimizer.learning_rate = Number(1e-4, "[0, inf)")
    optimizer.schedule = "constant"  # constant | cosine, both after warmup_steps
    optimizer.warmup_steps = Number(0, "[0, inf)")  # linear from 0
    optimizer.b1 = Number(0.9, "[0, 1)")
    optimizer.b2 = Number(0.999, "[0, 1)")
    optimizer.weight_decay = Number(0.0, "[0, inf)")
    optimizer.clip_norm = Number(0.0, "[0, inf)")  # global norm, 0 = off
    optimizer.ema_decay = Number(0.9999, "[0, 1)")  # per step
    # Parameters with a learning_rate or weight_decay of their own, or frozen; the first regular expression that matches
    # the whole path counts: (("stack/.*/adaln/.*", {"learning_rate": 1e-5}), ("label/.*", {"frozen": True}))
    optimizer.groups = ()

    config.train = train = ConfigDict()
    train.num_steps = Number(1000, "[1, inf)")
    train.batch_size = Number(64, "[1, inf)")  # images per optimizer step over all devices
    train.accumulate_steps = Number(1, "[1, inf)")  # microbatches per step
    train.log_every_steps = Number(50, "[1, inf)")
    train.max_skipped = Number(0, "[0, inf)")  # steps in a row that are not finite and left out; one more ends the run

    config.eval = evaluation = ConfigDict()
    evaluation.every_steps = Number(0, "[0, inf)")  # grid and metrics of the EMA, after saving a checkpoint; 0 = off
    evaluation.num_samples = Number(10_000, "[0, inf)")  # for the metrics; 0 = grid only
    evaluation.final_samples = Number(50_000, "[0, inf)")  # the last step once more, if 0 < num_samples < this
    evaluation.loss_images = Number(0, "[0, inf)")  # held-out images for val_loss, at fixed noises and times; 0 = off
    evaluation.batch_size = Number(250, "[1, inf)")  # samples at a time over all devices, rounded up to even shares
    evaluation.grid_size = Number(10, "[1, 1000]")  # rows = columns of the grid
    evaluation.labels = "balanced"  # balanced (sample i is of class i % num_classes) | random
    evaluation.inception = ""  # converted Inception weights (.npz) for FID; "" = the distance by a small convnet
    evaluation.reference = ""  # reference .npz in the ADM layout; "" = at most 10,000 images of data.eval_split

    config.diagnosis = diagnosis = ConfigDict()
    diagnosis.every_steps = Number(0, "[0, inf)")  # states, gradients and entropy by depth, to TensorBoard; 0 = off
    diagnosis.num_images = Number(16, "[1, inf)")  # training images measured each time, over all devices

    config.checkpoint = checkpoint = ConfigDict()
    checkpoint.every_steps = Number(500, "[1, inf)")
    checkpoint.keep = Number(2, "[1, inf)")  # latest checkpoints kept, beside the best by the first metric of eval

    config.mesh = mesh = ConfigDict()
    mesh.data = Number(-1, "[-1, inf)")  # devices over which only the batch is split; -1, of one axis: all the rest
    mesh.fsdp = Number(1, "[-1, inf)")  # devices over which batch, parameters and optimizer state are split
    mesh.tensor = Number(1, "[-1, inf)")  # devices that share matrices and tokens of a sample; divides heads, tokens
    return config


def route(config: ConfigDict, variant: str | None, **additions: dict[str, Any]) -> ConfigDict:
    """Sets what a config argument names, routing, additions and hardware, alike in all configs.

    `configs/x.py:static_t+repa@v5e` is static_t, the fields that `additions` has for "repa", as {"repa.block": 8}, and
    the mesh of a v5e. Names may be left out: `+repa` is static_t with REPA.
    """
    variant, _, hardware = (variant or "").partition("@")
    variant, *names = variant.split("+")
    variant = variant or "static_t"
    check_choice("config variant", variant, VARIANTS)
    for name in names:
        check_choice("addition to the config variant", name, additions)
        config.update_from_flattened_dict(additions[name])
    if hardware:
        check_choice("hardware of the config variant", hardware, MESHES)
        config.mesh.update(MESHES[hardware])
    if variant in ("residual", *RIVALS):
        config.model.routing.kind = variant
        if variant == "delta":
            config.model.routing.update(query="static", summary="sum")
    else:
        config.model.routing.kind, config.model.routing.query = "dar", variant
    return config


def micro_batch(config: ConfigDict) -> int:
    """Images of a microbatch, over all devices."""
    return config.train.batch_size // config.train.accumulate_steps


def check_fields(section: ConfigDict, fields: ConfigDict | None = None, prefix: str = "config") -> None:
    """Raises UserError for an unknown key, a missing key, a value of another type, or a number outside its range.

    Args:
      section: a config, or one of its sections.
      fields: what `schema()` has there; None stands for all.
      prefix: what the section is called.
    """
    fields = schema() if fields is None else fields
    for key in section:
        check_key(key, fields, prefix)
    for key, field in fields.items():
        name = f"{prefix}.{key}"
        if key not in section:
            raise UserError(f'config key "{name}" is missing; start from dar_jax.config.default().')
        if isinstance(field, Number):
            check_number(name, section[key], type(field.default), field.interval)
        elif not isinstance(section[key], type(field)):
            raise UserError(f"{name} = {section[key]!r} must be of type {type(field).__name__}.")
        elif isinstance(field, ConfigDict):
            check_fields(section[key], field, name)


def check_key(key: str, fields: ConfigDict, prefix: str) -> None:
    """Raises UserError unless the section `prefix`, which has `fields`, has the field `key`."""
    if key not in fields:
        raise UserError(f'config key "{prefix}.{key}" is unknown.{near_miss(key, fields)}')
