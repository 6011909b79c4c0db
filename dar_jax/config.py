"""Every choice an experimenter has, with its meaning and default. A file in configs/ changes some of them.

`default()` is the schema: a config with a key that is not here is an error that names the near miss. What values a
field may take is checked by the package that reads it, and by `dar_jax.validate` for all of them.
"""

from ml_collections import ConfigDict

from dar_jax.errors import UserError, check_choice, near_miss

# The published sizes of SiT: config.model.update(**SIZES["XL"]).
SIZES = {
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
}

VARIANTS = ("residual", "static", "static_t", "dynamic")

# config.mesh by hardware (TPU slices, hosts of 8 GPUs), in any number: the fsdp that leaves room beside the 11 GB which
# weights, EMA and optimizer of XL/2 take. All other devices are along the data axis.
MESHES = {"v4": {"fsdp": 8}, "v5e": {"fsdp": 16}, "v5p": {"fsdp": 4}, "v6e": {"fsdp": 16}, "gpu8": {"fsdp": 8}}


def default() -> ConfigDict:
    """Returns the locked config of all fields. Sizes are for 8x8 digits; experiments override what they mean."""
    config = ConfigDict()
    config.seed = 0  # parameters, data order, noise: everything random follows from it
    config.init_from = ""  # workdir whose EMA weights to start from: of the same model, or residual to any routing

    config.data = data = ConfigDict()
    data.source = "digits"  # digits | idx | folder | tfds | latents (prepared) | synthetic (random latents)
    data.path = ""  # idx, folder and latents: the directory; tfds: data_dir ("" = the tfds default)
    data.name = ""  # tfds: the data set, e.g. "imagenet2012"
    data.train_split = "train"
    data.eval_split = "test"  # held-out images, the reference of the metrics unless eval.reference is given
    data.image_size = 8  # height = width: pixels after crop, or latents
    data.flip = False  # random horizontal flip in training
    data.vae = ""  # directory of a VAE: decodes latent samples, and encodes images for a model of latents; "" = none
    data.verify = True  # latents: compare the checksums of all shards before training
    data.num_workers = 0  # grain worker processes; 0 reads in the training process

    config.model = model = ConfigDict()
    model.input_size = 8  # height = width of the tensor the model sees: pixels or latents
    model.family = "sit"  # sit
    model.space = "pixels"  # what x1 is: pixels | latents (of data.vae)
    model.channels = 1
    model.num_classes = 10  # the null label of guidance is num_classes
    model.patch_size = 2
    model.hidden_size = 128
    model.depth = 6  # blocks; a block is two sublayers, attention and MLP
    model.num_heads = 4
    model.mlp_ratio = 4.0
    model.learn_sigma = False  # official checkpoints: twice the output channels, the first half is used
    model.label_dropout = 0.1  # probability of training on the null label
    model.dtype = "float32"  # computation: float32 | bfloat16; parameters are always float32
    model.remat = (
        "dense"  # kept for backward: dense (outputs of dense layers) | block (inputs of blocks, routed: chunks)
    )

    model.routing = routing = ConfigDict()
    routing.kind = "dar"  # residual | dar
    routing.query = "static_t"  # static | static_t | dynamic
    routing.chunk_size = 4  # sublayers per chunk, S: 1 (dense) or an even divisor of 2 * depth
    routing.summary = "last"  # a chunk's summary: last (the paper) | sum (Attention Residuals)
    routing.final = "dedicated"  # the head's aggregator: dedicated | shared (with the last MLP) | summaries
    routing.implementation = "auto"  # auto (kernels on TPU and GPU) | xla | pallas; all compute the same

    config.diffusion = diffusion = ConfigDict()
    diffusion.interpolant = "linear"  # linear | gvp | vp
    diffusion.prediction = "velocity"  # velocity | score | noise | x (the data)
    diffusion.weighting = "none"  # none | velocity | likelihood; ignored for velocity and x
    diffusion.time = "uniform"  # uniform | logit_normal
    diffusion.time_mean = 0.0  # logit_normal: mean of logit(t)
    diffusion.time_std = 1.0  # logit_normal: standard deviation of logit(t)

    config.sampler = sampler = ConfigDict()
    sampler.method = "heun"  # ODE: euler | heun | dopri5; SDE: sde_euler | sde_heun
    sampler.num_steps = 50  # of the fixed-step solvers (heun: two evaluations each); the SDE's last step is one of them
    sampler.atol = 1e-6  # dopri5
    sampler.rtol = 1e-3  # dopri5
    sampler.diffusion_form = "sigma"  # SDE: constant|sbdm|sigma|linear|decreasing|increasing_decreasing
    sampler.diffusion_norm = 1.0  # SDE: factor of the form
    sampler.last_step = "mean"  # SDE: none | mean | tweedie | euler
    sampler.last_step_size = 0.04  # SDE
    sampler.cfg_scale = 1.0  # 1 = no guidance
    sampler.cfg_channels = 0  # guided channels, 0 = all; official SiT guides the first 3 of 4
    sampler.cfg_interval = (0.0, 1.0)  # guidance acts for t in this range (t = 0 noise, 1 data)

    config.optimizer = optimizer = ConfigDict()
    optimizer.learning_rate = 1e-4
    optimizer.schedule = "constant"  # constant | cosine, both after warmup_steps
    optimizer.warmup_steps = 0  # linear from 0
    optimizer.b1 = 0.9
    optimizer.b2 = 0.999
    optimizer.weight_decay = 0.0
    optimizer.clip_norm = 0.0  # global norm, 0 = off
    optimizer.ema_decay = 0.9999  # per step
    # Parameters with a learning_rate or weight_decay of their own, or frozen; the first regular expression that matches
    # the whole path counts: (("stack/.*/adaln/.*", {"learning_rate": 1e-5}), ("label/.*", {"frozen": True}))
    optimizer.groups = ()

    config.train = train = ConfigDict()
    train.num_steps = 1000
    train.batch_size = 64  # images per optimizer step over all devices
    train.accumulate_steps = 1  # microbatches per step
    train.log_every_steps = 50
    train.max_skipped = 0  # steps in a row of NaN or infinite loss or gradient that are left out; one more ends the run

    config.eval = evaluation = ConfigDict()
    evaluation.every_steps = 0  # sample grid and metrics on the EMA, after saving a checkpoint; 0 = off
    evaluation.num_samples = 10_000  # for the metrics; 0 = grid only
    evaluation.final_samples = 50_000  # the metrics of the last step once more, if these are more samples
    evaluation.batch_size = 250  # samples drawn at a time, over all devices, rounded up to what they share evenly
    evaluation.grid_size = 10  # rows = columns of the grid
    evaluation.labels = "balanced"  # balanced (sample i is of class i % num_classes) | random
    evaluation.inception = ""  # converted Inception weights (.npz) for FID; "" = the distance by a small convnet
    evaluation.reference = ""  # reference .npz in the ADM layout; "" = at most 10,000 images of data.eval_split

    config.diagnosis = diagnosis = ConfigDict()
    diagnosis.every_steps = 0  # states, gradients and routing entropy by depth, to TensorBoard; 0 = off
    diagnosis.num_images = 16  # training images measured each time, over all devices

    config.checkpoint = checkpoint = ConfigDict()
    checkpoint.every_steps = 500
    checkpoint.keep = 2  # latest checkpoints kept, beside the best by the first metric of eval

    config.mesh = mesh = ConfigDict()
    mesh.data = -1  # devices over which only the batch is split; -1, of one axis: all the rest
    mesh.fsdp = 1  # devices over which batch, parameters and optimizer state are split
    mesh.tensor = 1  # devices that share the matrices and tokens of one sample; it divides num_heads and the tokens
    return config.lock()


def route(config: ConfigDict, variant: str | None) -> ConfigDict:
    """Sets what a config argument names, routing and hardware (`configs/x.py:static_t@v5e`), alike in all configs."""
    variant, _, hardware = (variant or "").partition("@")
    variant = variant or "static_t"
    check_choice("config variant", variant, VARIANTS)
    if hardware:
        check_choice("hardware of the config variant", hardware, MESHES)
        config.mesh.update(MESHES[hardware])
    if variant == "residual":
        config.model.routing.kind = "residual"
    else:
        config.model.routing.kind, config.model.routing.query = "dar", variant
    return config


def micro_batch(config: ConfigDict) -> int:
    """Images of a microbatch, over all devices."""
    return config.train.batch_size // config.train.accumulate_steps


def check_keys(config: ConfigDict, schema: ConfigDict | None = None, prefix: str = "config") -> None:
    """Raises UserError for a key that `default()` has not, a key that is missing, or a value of another type."""
    schema = default() if schema is None else schema
    for key in config:
        check_key(key, schema, prefix)
    for key, value in schema.items():
        name = f"{prefix}.{key}"
        if key not in config:
            raise UserError(f'config key "{name}" is missing; start from dar_jax.config.default().')
        kinds = (int, float) if isinstance(value, float) else type(value)
        if not isinstance(config[key], kinds):
            raise UserError(f"{name} = {config[key]!r} must be of type {type(value).__name__}.")
        if isinstance(value, ConfigDict):
            check_keys(config[key], value, name)


def check_key(key: str, schema: ConfigDict, prefix: str) -> None:
    """Raises UserError unless `schema`, the section `prefix`, has the field `key`."""
    if key not in schema:
        raise UserError(f'config key "{prefix}.{key}" is unknown.{near_miss(key, schema)}')
