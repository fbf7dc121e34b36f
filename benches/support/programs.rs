//! Programs of every kind at one hook point of a model that needs not be there, and the rows of a batch for them.

use pilotfish::guard::{Digest, Fingerprint, Guard, MappingFile, ModelIdentity};
use pilotfish::mapping::{
    AffineMap, Autoencoder, AutoencoderQuality, AutoencoderWeights, MappingQuality, Standardization,
};
use pilotfish::program::{Calibration, ModelShape, Program, RowKind};
use pilotfish::tensor::{HiddenSize, LayerIndex, SequenceId, TokenPosition};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::tensor::{Dtype, TensorView};

pub const LAYER: LayerIndex = LayerIndex(0);

/// Residual widths: SmolLM2-135M, a 1B, an 8B, a 70B model.
pub const WIDTHS: [usize; 4] = [576, 2048, 4096, 8192];
/// Rows: a token of an answer, one of each of eight answers, and a micro-batch of a prompt.
pub const ROWS: [usize; 3] = [1, 8, 512];

/// What a program does, and what that adds to a manifest.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    pub name: &'static str,
    policy: &'static str,
    map: Option<Map>,
}

#[derive(Debug, Clone, Copy)]
enum Map {
    Affine,
    Autoencoder,
}

/// A switch of 4096 values would be a map of 64 MiB, and two of them in an autoencoder: more than caches hold, and than is quickly made.
const WIDEST_MAP: usize = 2048;

pub const KINDS: [Kind; 8] = [
    plain("gate", GATE),
    plain("add", "[[intervention]]\nkind = \"add\"\nvector = \"v\"\nstrength = 1e-6\n"),
    plain(
        "gated add",
        "[[gate]]\nname = \"g\"\nvector = \"v\"\nscope = \"token\"\nthreshold = -1e9\nmean = 0.0\ndeviation = 1.0\n\
         [[intervention]]\nkind = \"add\"\nvector = \"v\"\nstrength = 1e-6\nwhen = \"g\"\n",
    ),
    plain("ablate", "[[intervention]]\nkind = \"ablate\"\nvector = \"v\"\nmean = 0.5\nstrength = 1e-6\n"),
    plain("clamp", "[[intervention]]\nkind = \"clamp\"\nvector = \"v\"\nlow = -1.0\nhigh = 1.0\nstrength = 1e-6\n"),
    plain("rotate", "[[intervention]]\nkind = \"rotate\"\nvector = \"v\"\nangle = 90.0\nstrength = 1e-6\n"),
    Kind { name: "switch", policy: SWITCH, map: Some(Map::Affine) },
    Kind { name: "autoencoder", policy: SWITCH, map: Some(Map::Autoencoder) },
];

const GATE: &str =
    "[[gate]]\nname = \"g\"\nvector = \"v\"\nscope = \"token\"\nthreshold = 1e9\nmean = 0.0\ndeviation = 1.0\n";
const SWITCH: &str = "[[intervention]]\nkind = \"switch\"\nmapping = \"m\"\nstrength = 1e-6\n";

const fn plain(name: &'static str, policy: &'static str) -> Kind {
    Kind { name, policy, map: None }
}

impl Kind {
    /// Whether to time it at this width.
    pub fn reaches(&self, width: usize) -> bool {
        self.map.is_none() || width <= WIDEST_MAP
    }

    pub fn program(&self, width: usize) -> Program {
        let fingerprint = Fingerprint::compute("llama", width as u32, 2, std::iter::empty::<(&str, u32)>());
        let values: Vec<u8> = (0..width).flat_map(|i| ((i as f32 * 0.37).sin()).to_le_bytes()).collect();
        let view = TensorView::new(Dtype::F32, vec![width], &values).expect("one row");
        let tensors = safetensors::serialize([("v.0", view)], None).expect("a tensor file");
        let mut manifest = format!(
            "format = 1\nname = \"bench\"\ndescription = \"\"\n[target]\narchitecture = \"llama\"\n\
             fingerprint = \"{fingerprint}\"\n[tensors]\nfile = \"tensors.safetensors\"\nsha256 = \"{}\"\n\
             [[vector]]\nname = \"v\"\nlayer = {LAYER}\ntensor = \"v.0\"\n{}",
            Digest::of(&tensors),
            self.policy
        );
        let map = self.map.map(|map| {
            let bytes = map.file(width, fingerprint);
            let kind = match map {
                Map::Affine => "affine",
                Map::Autoencoder => "autoencoder",
            };
            manifest += &format!(
                "[[mapping]]\nname = \"m\"\nsha256 = \"{}\"\nkind = \"{kind}\"\nsource_layer = {LAYER}\ntarget_layer = {LAYER}\n",
                Digest::of(&bytes)
            );
            bytes
        });
        let maps: Vec<&[u8]> = map.iter().map(Vec::as_slice).collect();
        let guard = Guard::from_parts("bench", manifest.as_bytes(), &tensors, &maps).expect("a valid guard");
        // Of the last layer a token gate reads nothing.
        let shape = ModelShape { n_embd: HiddenSize(width), n_layer: 2 };
        Program::compile(&guard, shape, Calibration::Required).expect("a guard of this width")
    }
}

impl Map {
    /// A mapping file of random weights that keep a row's norm.
    fn file(self, width: usize, fingerprint: Fingerprint) -> Vec<u8> {
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        let size = (3.0 / width as f32).sqrt();
        let mut random = |n: usize| -> Vec<f32> { (0..n).map(|_| rng.random_range(-size..size)).collect() };
        let side = || Standardization { mean: vec![0.0; width], scale: vec![1.0; width] };
        let model =
            ModelIdentity { name: "bench".into(), architecture: "llama".into(), fingerprint, adapters: Vec::new() };
        let mut file = MappingFile {
            source: model.clone(),
            target: model,
            corpus: "none".into(),
            seed: 0,
            pairs: Vec::new(),
            autoencoders: Vec::new(),
            replacements: Default::default(),
        };
        let (fraction_unexplained, cosine, n_train, n_heldout) = (1.0, 0.0, 0, 0);
        match self {
            Self::Affine => {
                let map = AffineMap::new(LAYER, LAYER, side(), side(), random(width * width));
                let quality =
                    MappingQuality { lambda: 0.0, fraction_unexplained, cosine, n_train, n_heldout, backward: None };
                file.pairs.push((map.expect("equal widths"), quality));
            }
            Self::Autoencoder => {
                let weights = AutoencoderWeights {
                    encoder: random(width * width),
                    encoder_bias: random(width),
                    decoder: random(width * width),
                    decoder_bias: random(width),
                };
                let map = Autoencoder::new(LAYER, LAYER, side(), side(), weights);
                let quality = AutoencoderQuality { fraction_unexplained, cosine, n_train, n_heldout };
                file.autoencoders.push((map.expect("equal widths"), quality));
            }
        }
        file.to_bytes().expect("a mapping file")
    }
}

/// One row of each of a few answers, or the last rows of one prompt.
pub fn rows(n: usize) -> Vec<(SequenceId, TokenPosition, RowKind)> {
    let row = |index: usize| match n {
        0..=8 => (SequenceId(index as i32), TokenPosition(1), RowKind::Generated),
        _ => (SequenceId(0), TokenPosition(index as i32 + 1), RowKind::Prompt),
    };
    (0..n).map(row).collect()
}
