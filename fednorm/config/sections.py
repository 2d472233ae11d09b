"""The sections of the configuration that are values: which data, how to train, the rounds, what is measured."""

from __future__ import annotations

from typing import Literal

from fednorm.config.adaptations import Adaptations
from fednorm.config.augmentations import Augment
from fednorm.config.evaluated import Evaluated
from fednorm.config.schema import Kind, Names, Section, choose, key
from fednorm.config.trainable import Parts
from fednorm.errors import ConfigError

ROUNDS: tuple[Kind, ...] = ("federated",)
CONTINUAL: tuple[Kind, ...] = ("continual",)
BOTH: tuple[Kind, ...] = ("federated_continual",)
FEDERATED: tuple[Kind, ...] = (*ROUNDS, *BOTH)
IN_ROUNDS: dict[Kind, str] = {"federated": "train.local_epochs", "federated_continual": "rounds.per_experience"}

OF_OPTIMIZERS = ("nesterov", "wd_ratio", "delta", "beta_utility", "sigma")
"""Keys of section train that are options of some optimizers: those whose maker has a parameter of that name."""

EVALUATIONS = ("own", "cross", "averaged", "pooled", "reestimated", "unseen")


class DataConfig(Section, name="data"):
    """Which data, and who holds what of it."""

    name: str = key("digits_mini", "A benchmark (`fednorm list data`), or the import path of your own data.")
    dir: str = key("", "The folder that holds the real data; not needed for digits_mini.")
    domains: Names = key((), "The domains to use, in this order; empty for all that the benchmark finds.")
    image_size: int = key(0, "Height and width to resize to, in pixels; 0 for the model's own input size.", ge=0)
    train_per_client: int = key(0, "Most training images a client; 0 for all. FedBN's protocol has 743.", ge=0)
    test_per_domain: int = key(0, "Most test images a domain; 0 for all.", ge=0)
    clients_per_domain: int = key(1, "Clients that share each domain.", ge=1)
    partition: Literal["iid", "dirichlet", "shards"] = key(
        "iid", "How a domain's training images are dealt to its clients."
    )
    alpha: float = key(0.5, "Concentration of the Dirichlet distribution of labels; small means skewed.", gt=0)
    shards_per_client: int = key(2, "Shards of label-sorted images a client gets.", ge=1)
    held_out: str = key("", "A domain that no client trains on (domain generalisation).")
    validation: float = key(
        0.0, "Share of the training images held back for choosing hyper-parameters, in [0, 1).", ge=0, lt=1
    )
    normalize: Literal["half", "none", "global", "domain"] = key(
        "half",
        "What images are scaled by before a network sees them, per channel: half (mean and std 0.5: to [-1, 1]), none "
        "(to [0, 1]), global (mean and std of all training images), domain (those of the training images of each "
        "image's own domain; global for a domain that nobody trains on). Training and evaluation alike.",
    )
    merge: bool = key(
        False,
        "Whether each domain's train and test images are merged and split again 80/20, stratified, as FedBN does.",
    )
    split_seed: int = key(
        0,
        "Of everything that deals images (partitions, validation, caps; a stream's order), apart from the run's seed; "
        "0 for the run's seed.",
        ge=0,
    )
    download: bool = key(False, "Whether torchvision may download what is missing.")


class TrainConfig(Section, name="train"):
    """How a client trains in a round, and a learner on an experience."""

    optimizer: str = key("sgd", "The optimizer (`fednorm list optimizers`).")
    learning_rate: float = key(0.01, "Of the optimizer, per step, before the schedule.", gt=0, continual=0.03)
    batch_size: int = key(32, "New images a step; the last batch of an epoch may be smaller.", ge=1)
    local_epochs: int | float = key(
        1,
        "E, passes over a client's images a round; 0.5 is a half of them, another half every round.",
        gt=0,
        kinds=FEDERATED,
    )
    local_steps: int = key(0, "Steps of a client a round, in place of local_epochs; 0 for those.", ge=0, kinds=ROUNDS)
    epochs: int = key(5, "Passes over each experience; 1 is online learning.", ge=1, kinds=CONTINUAL, instead=IN_ROUNDS)
    momentum: float = key(0.0, "Of sgd and sgdp.", ge=0, lt=1)
    nesterov: bool = key(False, "Whether a step looks ahead along the momentum; of sgd, sgdp and adamp.")
    weight_decay: float = key(
        0.0,
        "L2 regularization: added to the gradient, or decoupled from it where the optimizer does so (adamw, sgdp, "
        "adamp).",
        ge=0,
    )
    wd_ratio: float = key(0.1, "Share of weight_decay that a projected weight gets; of sgdp and adamp.", ge=0, le=1)
    delta: float = key(
        0.1,
        "How nearly orthogonal to its weight a gradient must be for the update to be projected, 0 for never; of sgdp "
        "and adamp.",
        ge=0,
    )
    beta_utility: float = key(0.999, "What a weight's utility keeps at each step; of upgd.", ge=0, lt=1)
    sigma: float = key(0.001, "Standard deviation of the noise on gradients, before it is gated; of upgd.", ge=0)
    label_smoothing: float = key(0.0, "Share of the label that is spread over all classes.", ge=0, lt=1)
    agc: float = key(0.0, "Lambda of adaptive gradient clipping; 0 for no clipping.", ge=0)
    agc_on: Literal["all", "convolutions", "linear"] = key(
        "all", "What agc clips: every parameter but the classifier's, or those of one type of layer alone."
    )
    clip_norm: float = key(
        0.0, "Longest gradient of all parameters together, after agc; 0 for any length. FLGo-Bench has 10.", ge=0
    )
    private_noise: float = key(
        0.0,
        "Noise multiplier of differentially private training (DP-SGD): the noise's standard deviation over "
        "private_clip; 0 for none. Needs the extra private (Opacus).",
        ge=0,
        kinds=ROUNDS,
    )
    private_clip: float = key(
        1.0, "Longest gradient of one image in private training; longer ones are shortened.", gt=0, kinds=ROUNDS
    )
    private_delta: float = key(1e-5, "Delta at which a private run's epsilon is told.", gt=0, lt=1, kinds=ROUNDS)
    augment: Augment = key(
        "none",
        "What is done to each image of a training batch, those from memory too: none, or names with commas between, in "
        "their order: crop (random, padding 4), flip (mirrored with probability one half), rotate (by rotate_degrees "
        "at most), jitter (of brightness, contrast and saturation), resized_crop (8 to 100 % of the image, drawn up).",
    )
    rotate_degrees: float = key(30.0, "Most degrees to either side of the augmentation rotate.", ge=0, le=180)
    jitter: float = key(
        0.4, "Of the augmentation jitter: its three factors are uniform in [1 - jitter, 1 + jitter].", ge=0, le=1
    )
    schedule: Literal["constant", "linear", "cosine", "step", "exponential"] = key(
        "constant",
        "Of the learning rate: linear and cosine fall to final_rate, step and exponential by the factor decay. It runs "
        "over the steps of a stream, and over the rounds of a federation.",
    )
    schedule_over: Literal["stream", "experience"] = key(
        "stream", "What the schedule runs over: the whole stream, or each experience anew.", kinds=CONTINUAL
    )
    warmup_steps: int = key(0, "Steps (rounds, in a federation) in which the rate first rises linearly.", ge=0)
    final_rate: float = key(0.0, "The learning rate at the end of the schedule, as a share of the first.", ge=0, le=1)
    decay: float = key(1.0, "Factor of the schedules step and exponential.", gt=0, le=1)
    decay_every: int = key(1, "Steps (rounds, in a federation) between two falls of the schedule step.", ge=1)
    reset_optimizer: bool = key(
        True,
        "Whether moments and momentum start anew with every round of a client, and every experience of a learner; if "
        "not, each client keeps its own between its rounds.",
        continual=False,
    )
    project: bool = key(
        False,
        "Whether every weight that a normalization follows is projected to its initial norm after each update (NaP's "
        "projection with any norm; norm nap brings its own).",
    )
    l2_init: float = key(0.0, "Factor of the squared distance to the initial parameters in the loss; 0 for none.", ge=0)
    shrink: float = key(
        1.0,
        "Factor of the parameters when an experience begins (shrink and perturb); 1 for none.",
        ge=0,
        le=1,
        kinds=CONTINUAL,
    )
    perturb: float = key(
        0.0, "Factor of the freshly initialised parameters that are then added; 0 for none.", ge=0, kinds=CONTINUAL
    )
    norms: Literal["keep", "reset", "freeze", "per_experience"] = key(
        "keep",
        "What the boundary between two experiences does with the tensors of normalization layers, beside what their "
        "cards say: keep; reset, to their initial values; freeze: they are trained in the first experience and stay as "
        "they are from then on, running statistics too; per_experience: they go on, and as they were at an "
        "experience's end they are used for its test images, where the task is given (task_accuracy) or inferred "
        "(evaluate.infer_task).",
        kinds=CONTINUAL,
        instead={"federated_continual": "grid.norms"},
    )
    trainable: Parts = key(
        "all",
        "What is trained: all, norm (the learned tensors of normalization layers), head, or norm,head; the rest stays "
        "at its initial value, and a federation does not send it.",
    )
    scale_init: Literal["own", "uniform"] = key(
        "own",
        "Initial scales of normalization layers: own (their method's, most often 1), or uniform for U(0, 1) in place "
        "of 1, as in the paper that trains only batch normalization.",
    )
    head: str = key(
        "head",
        "The head, for trainable and the linear probe: head is the last weight layer; else modules' paths or patterns "
        "over keys (classifier.*), separated by commas.",
    )
    heads: Literal["one", "task"] = key(
        "one",
        "Which classes a sample's loss is over: one, all of them (class-incremental); task, those of its experience, "
        "as with a head for each task (task-incremental). Of learners that train by cross-entropy.",
        kinds=(*CONTINUAL, *BOTH),
    )
    linear_probe_rounds: int = key(
        0, "First rounds, in which the head alone is trained; less than num_rounds.", ge=0, kinds=ROUNDS
    )
    linear_probe_epochs: int = key(
        0,
        "First epochs of each experience, in which the head alone is trained; less than epochs.",
        ge=0,
        kinds=CONTINUAL,
    )
    l2_scales: float = key(0.0, "Factor of the squared scales of normalization layers in the loss; 0 for none.", ge=0)
    weight_clip: float = key(
        0.0,
        "Largest weight of linear layers and convolutions after an update, as a multiple of the bound 1 / sqrt(fan-in) "
        "that PyTorch draws them within (weight clipping); 0 for none.",
        ge=0,
    )
    hyperspherical: bool = key(
        False,
        "Whether each unit's incoming weights are brought to length 1 after each update, the output layer's not "
        "(SimbaV2's projection).",
    )
    redo_every: int = key(0, "Updates between two resets of dormant units (ReDo); 0 for none.", ge=0)
    redo_tau: float = key(
        0.025, "A unit is dormant where its mean activation is at most this share of its layer's.", ge=0
    )
    cbp_rate: float = key(
        0.0,
        "Share of the mature units of each hidden layer that is replaced at each update, the least useful first "
        "(continual backprop); 0 for none.",
        ge=0,
        le=1,
    )
    cbp_maturity: int = key(100, "Updates before continual backprop may replace a unit.", ge=0)
    cbp_decay: float = key(0.99, "What a unit's utility keeps at each update of continual backprop.", ge=0, lt=1)
    snr_eta: float = key(
        0.0,
        "A unit is reset where so long a silence had at most this probability by its own past (self-normalized "
        "resets); 0 for none.",
        ge=0,
        lt=1,
    )
    snr_longest: int = key(500, "Updates of silence after which self-normalized resets reset any unit.", ge=1)
    checkpoint_every: int = key(
        500, "Steps between two checkpoints; the end of an experience always has one.", ge=1, kinds=CONTINUAL
    )

    def model_post_init(self, context: object) -> None:
        """Refuse a head that nobody asks for, and what would write to weights that are to stay as they are."""
        del context
        if self.heads == "task" and self.label_smoothing:
            raise ConfigError(
                "train.label_smoothing spreads a label over all classes, and with train.heads = 'task' a sample has "
                "those of its task alone. Leave one of the two out."
            )
        probes = self.linear_probe_rounds or self.linear_probe_epochs
        if self.head != "head" and "head" not in self.trainable.split(",") and not probes:
            raise ConfigError(
                f"train.head = {self.head!r} names the head for train.trainable = 'head' or 'norm,head' and for the "
                "linear probe (train.linear_probe_rounds, train.linear_probe_epochs), and none of them is set."
            )
        if self.trainable == "all":
            return
        for name in ("redo_every", "cbp_rate", "snr_eta", "perturb"):
            if getattr(self, name):
                raise ConfigError(
                    f"train.{name} sets weights anew, and train.trainable = {self.trainable!r} leaves them as they "
                    f"are. Leave train.{name} at 0, or train all."
                )

    def of_optimizer(self) -> dict[str, object]:
        """Return those of :data:`OF_OPTIMIZERS` that somebody set."""
        fields = type(self).model_fields
        return {name: value for name in OF_OPTIMIZERS if (value := getattr(self, name)) != fields[name].default}


class RoundConfig(Section, name="rounds"):
    """The rounds of the federation."""

    num_rounds: int = key(10, "Rounds of communication.", ge=1, kinds=ROUNDS, instead=IN_ROUNDS)
    per_experience: int = key(5, "Rounds of communication in each experience.", ge=1, kinds=BOTH)
    fraction: float = key(1.0, "Share of the clients sampled each round, in (0, 1].", gt=0, le=1)
    weighting: Literal["examples", "equal"] = key(
        "examples", "Weights of the average: equal, or examples (proportional to each client's images)."
    )
    evaluate_every: int = key(
        1, "Evaluate each so many rounds; the last round is always evaluated.", ge=1, kinds=ROUNDS
    )
    checkpoint_every: int = key(1, "Write a checkpoint each so many rounds; the last round always has one.", ge=1)
    max_update_norm: float = key(
        0.0,
        "A client is rejected whose update, ||w_k - w||_2 over every floating-point tensor that travels (running "
        "statistics included), is longer; 0 for no limit. rounds.jsonl has the norm of every update.",
        ge=0,
    )
    min_answered: float = key(
        1.0,
        "Share of the clients with images to score that must answer the last evaluation, in [0, 1]; with fewer, or "
        "with nobody of a whole domain, the run fails. At 0 whatever came is the result. Either way the result says "
        "who is missing. A run that failed so can be called again with a lower share: its rounds stand.",
        ge=0,
        le=1,
    )
    min_nodes: int = key(
        0,
        "Of a run on real nodes (--runtime deployment): the fewest that it starts with once rounds.wait is over; 0 for "
        "all that data.domains names. Those that come later take part from the next round on.",
        ge=0,
        kinds=ROUNDS,
    )
    wait: float = key(
        120.0, "Of a run on real nodes: seconds to wait for them before the first round.", ge=0, kinds=ROUNDS
    )
    timeout: float = key(
        3600.0,
        "Seconds to wait for the answers of a round; the round goes on with those that came, and later ones are "
        "dropped. In this process's own clients it never comes to that.",
        gt=0,
        kinds=ROUNDS,
    )


class GridConfig(Section, name="grid"):
    """Who meets which experience when, and what of it: clients times experiences; each cell is a split."""

    clients: int = key(5, "Clients, each with a stream of its own.", ge=1, kinds=BOTH)
    partition: Literal["iid", "dirichlet"] = key(
        "iid", "How an experience's training images are dealt to the clients that meet it.", kinds=BOTH
    )
    alpha: float = key(
        0.5, "Concentration of the Dirichlet distribution of labels; small means skewed.", gt=0, kinds=BOTH
    )
    order: Literal["same", "rotated", "own"] = key(
        "same",
        "When a client meets which experience: all the same at the same time; rotated, client k begins with experience "
        "k and goes on from there; own, each in an order drawn for it. Clients that meet at the same time or not share "
        "an experience's images.",
        kinds=BOTH,
    )
    min_images: int = key(
        2,
        "Fewest training images of an experience with which a client takes part; with fewer it skips it.",
        ge=1,
        kinds=BOTH,
    )
    norms: Literal["keep", "reset", "freeze", "per_experience"] = key(
        "keep",
        "What the boundary between two experiences does with the tensors of normalization layers, beside what their "
        "cards say: keep; reset, to their initial values; freeze: they are trained in the first experience and stay as "
        "they are from then on, running statistics too; per_experience: they go on, and as they were at an "
        "experience's end they are used for its test images (evaluate.task_identity, evaluate.infer_task).",
        kinds=BOTH,
    )
    joining: int = key(
        0,
        "Clients, of the last ones, that join at each experience after the first; before it they hold nothing.",
        ge=0,
        kinds=BOTH,
    )
    leaving: int = key(
        0,
        "Clients, of the first ones, that leave before each experience after the first; they come back no more.",
        ge=0,
        kinds=BOTH,
    )


class EvaluateConfig(Section, name="evaluate"):
    """What is measured: of a federation after its rounds, of a stream after each experience."""

    kinds: Names = key(
        ("own",), f"The evaluation matrix after the last round: any of {', '.join(EVALUATIONS)}.", kinds=ROUNDS
    )
    clients: Evaluated = key(
        "all",
        "Which clients are evaluated: all, sampled (those that were asked to train in the round), or a number of them: "
        "one draw for the whole run by its seed, as many of each domain as can be. Tables say which.",
        kinds=FEDERATED,
    )
    images: int = key(
        128,
        "k, the unlabelled test images a client re-estimates its statistics on; 2 or more, to estimate a variance.",
        ge=2,
        kinds=ROUNDS,
    )
    fallback: Literal["refuse", "averaged", "pooled", "reestimated"] = key(
        "refuse",
        "The local tensors with which an unseen domain is evaluated where the strategy leaves the server without any.",
        kinds=ROUNDS,
    )
    split: Literal["test", "validation"] = key(
        "test", "The images that are scored; validation for choosing hyper-parameters."
    )
    experiences: Literal["auto", "all", "seen", "current"] = key(
        "auto",
        "Which experiences are scored each time: all, those seen so far, or the current one. auto is current for a "
        "memorization stream and all else; transfer to experiences to come is measured with all only.",
        kinds=CONTINUAL,
    )
    batch_size: int = key(64, "Images a forward pass.", ge=1, continual=128)
    train_images: int = key(
        1000,
        "Most training images of the experience for its training accuracy; 0 for all of them.",
        ge=0,
        kinds=CONTINUAL,
    )
    probe_images: int = key(
        512,
        "Training images of all experiences so far, as many of each, on which dead units, rank and drift are measured; "
        "0 for none of these.",
        ge=0,
        kinds=CONTINUAL,
    )
    online: Literal["train", "eval"] = key(
        "train",
        "Whether online accuracy is that of the train step's own outputs, for which a batch norm takes the batch's "
        "statistics and images are augmented, or of eval: one more forward pass before the step, in evaluation mode, "
        "on the images as they are. Norms are comparable in the latter only.",
        kinds=CONTINUAL,
    )
    task_identity: bool = key(
        False,
        "Whether the experience of a test image is known: then it is scored among that experience's own classes, and "
        "under its own normalization tensors where they are kept per experience (grid.norms).",
        kinds=BOTH,
    )
    infer_task: Literal["none", "entropy", "statistics"] = key(
        "none",
        "How the experience of a test image is inferred where its normalization tensors are kept per experience and "
        "it is not given: entropy, that under whose tensors the network's answer is surest; "
        "statistics, that whose running moments the first layer's input fits best; none, not at all. The image is "
        "then scored as if that one had been given.",
        kinds=(*CONTINUAL, *BOTH),
    )
    infer_task_per: Literal["image", "batch"] = key(
        "image",
        "Whether the experience is inferred for each image, or for each batch (batch_size), whose images are then "
        "taken to be of the same.",
        kinds=(*CONTINUAL, *BOTH),
    )
    every_steps: int = key(
        0,
        "Steps between two evaluations on the experiences seen so far (anytime evaluation); 0 for none.",
        ge=0,
        kinds=CONTINUAL,
    )
    every_images: int = key(0, "Most images of each experience in those; 0 for all.", ge=0, kinds=CONTINUAL)
    average_last: int = key(
        5,
        "Evaluations, the last one included, that average_late_accuracy is the mean of.",
        ge=1,
        kinds=CONTINUAL,
    )
    best_round: bool = key(
        False,
        "Whether evaluated rounds also score the images held back (data.validation), and the result tells the round "
        "that is best on them beside the last.",
        kinds=ROUNDS,
    )
    central: bool = key(
        False,
        "Whether the server scores the shared model itself, on images of its own (evaluate.central_dir), after each "
        "evaluated round. Not where the strategy keeps tensors on the clients: the server has no whole model then.",
        kinds=ROUNDS,
    )
    central_dir: str = key(
        "",
        "The folder of the server's own images, on the server's machine: CLASS/*.png, all of which are scored, or "
        "{train,test}/CLASS/*.png. Its classes are called as the run's are.",
        kinds=ROUNDS,
    )
    adaptation: Adaptations = key(
        (),
        "Test-time adaptations (`fednorm list adaptations`) under which the finished network is scored besides: names, "
        "or tables of a name and options, among them batch_size, order and reset; an option's list of values is every "
        "value in turn. Scored are the clients of the domain held out, else all; of a stream, its experiences.",
        kinds=(*ROUNDS, *CONTINUAL),
    )
    diagnostics: bool = key(
        True,
        "Whether evaluated rounds tell how clients' running statistics drift and how the weights stand; for it, "
        "clients that keep their statistics are asked for them.",
        kinds=FEDERATED,
    )

    def model_post_init(self, context: object) -> None:
        """Refuse kinds that are none, and a probe from which no variance can be estimated."""
        del context
        for kind in self.kinds:
            choose("evaluate.kinds", kind, EVALUATIONS)
        if self.infer_task == "none" and self.infer_task_per == "batch":
            raise ConfigError(
                "evaluate.infer_task_per = 'batch' says for how many images together an experience is inferred, and "
                "evaluate.infer_task is 'none'. Set that to 'entropy' or 'statistics', or leave both out."
            )
        if self.infer_task != "none" and self.task_identity:
            raise ConfigError(
                f"evaluate.infer_task = {self.infer_task!r} infers the experience of a test image, and with "
                "evaluate.task_identity = true it is given. Leave one of the two out."
            )
        if self.probe_images == 1:
            raise ConfigError("evaluate.probe_images must be 0 or at least 2, to estimate a variance; got 1.")
