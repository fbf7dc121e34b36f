use super::error::{GuardError, shown};
use super::manifest::MappingKind;
use super::tensors::{self, TensorData, TensorFile};
use super::{MAX_WIDTH, ModelIdentity};
use crate::mapping::{
    AffineMap, Autoencoder, AutoencoderQuality, AutoencoderWeights, Factors, FitQuality, MapQuality, MappingError,
    MappingQuality, ReplacementQuality, ResidualMap, Standardization,
};
use crate::steering::{ClassMeans, VectorKind};
use crate::tensor::{LayerIndex, LayerStack};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

const FORMAT: &str = "pilotfish-mapping-1";

/// Mappings between the residuals of two models, as `map` writes them. A guard picks one by its pair of layers.
///
/// In safetensors a pair of layers S (`24`, or `14+16+18` where an affine map reads several beside each other) and T is the tensors `S-T.weight` (`[d_s, d_t]`), `S-T.source_mean` and `S-T.source_scale`
/// (`[d_s]`), `S-T.target_mean` and `S-T.target_scale` (`[d_t]`), if it can carry discriminants `S-T.backward` (`[d_t, d_s]`), and the metadata
/// key `S-T`. A map of low rank R has in place of the weight its factors `S-T.left` (`[d_s, R]`) and `S-T.right` (`[R, d_t]`), and
/// `S-T.backward_left` and `S-T.backward_right`. Of a correction, a map between residuals of one space that is added to what it reads, the metadata say
/// `"correction": true`. An autoencoder of hidden width `k` has in place of the weights `S-T.encoder` (`[k, d_s]`), `S-T.encoder_bias` (`[k]`), `S-T.decoder`
/// (`[d_t, k]`) and `S-T.decoder_bias` (`[d_t]`).
#[derive(Debug, Clone, PartialEq)]
pub struct MappingFile {
    pub source: ModelIdentity,
    pub target: ModelIdentity,
    /// What both models read, for people.
    pub corpus: String,
    /// Of the split into training and held-out documents.
    pub seed: u64,
    /// Read in the order of source layer, then target layer.
    pub pairs: Vec<(AffineMap, MappingQuality)>,
    /// In the same order. A pair of layers has a map of one kind.
    pub autoencoders: Vec<(Autoencoder, AutoencoderQuality)>,
    /// Of pairs of layers of which it was measured.
    pub replacements: BTreeMap<(LayerStack, LayerIndex), ReplacementQuality>,
}

/// What the metadata says of a pair of layers.
#[derive(Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
enum Description {
    Affine(AffineDescription),
    Autoencoder(AutoencoderDescription),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct AutoencoderDescription {
    fraction_unexplained: f64,
    cosine: f64,
    n_train: usize,
    n_heldout: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    replacement: Option<ReplacementDescription>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ReplacementDescription {
    kl: f64,
    kl_mean_ablation: f64,
    replaced: f64,
    n_tokens: usize,
    n_documents: usize,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct AffineDescription {
    lambda: f64,
    fraction_unexplained: f64,
    cosine: f64,
    n_train: usize,
    n_heldout: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    backward: Option<BackwardDescription>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    replacement: Option<ReplacementDescription>,
    /// Where the weights are two factors each.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rank: Option<usize>,
    /// Whether what the weight gives is added to the residual that it reads.
    #[serde(default, skip_serializing_if = "is_false")]
    correction: bool,
}

fn is_false(value: &bool) -> bool {
    !value
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct BackwardDescription {
    lambda: f64,
    fraction_unexplained: f64,
    cosine: f64,
}

impl MappingFile {
    /// The pair from `source` to `target`.
    pub fn pair(&self, source: &LayerStack, target: LayerIndex) -> Option<&(AffineMap, MappingQuality)> {
        self.pairs.iter().find(|(map, _)| map.source_layer() == source && map.target_layer() == target)
    }

    /// The autoencoder from `source` to `target`.
    pub fn autoencoder(&self, source: LayerIndex, target: LayerIndex) -> Option<&(Autoencoder, AutoencoderQuality)> {
        self.autoencoders.iter().find(|(map, _)| map.source_layer() == source && map.target_layer() == target)
    }

    /// The map of that kind from `source` to `target`, with its quality.
    pub fn map_with_quality(
        &self,
        kind: MappingKind,
        source: &LayerStack,
        target: LayerIndex,
    ) -> Option<(ResidualMap, MapQuality)> {
        let map = self.map(kind, source, target)?;
        let quality = match kind {
            MappingKind::Affine => MapQuality::Affine(self.pair(source, target)?.1),
            MappingKind::Autoencoder => MapQuality::Autoencoder(self.autoencoder(source.single()?, target)?.1),
        };
        Some((map, quality))
    }

    /// The map of that kind from `source` to `target`.
    pub fn map(&self, kind: MappingKind, source: &LayerStack, target: LayerIndex) -> Option<ResidualMap> {
        match kind {
            MappingKind::Affine => self.pair(source, target).map(|(map, _)| ResidualMap::Affine(map.clone())),
            MappingKind::Autoencoder => {
                self.autoencoder(source.single()?, target).map(|(map, _)| ResidualMap::Autoencoder(map.clone()))
            }
        }
    }

    /// Every map with its quality: the affine ones, then the autoencoders.
    pub fn maps(&self) -> Vec<(ResidualMap, MapQuality)> {
        let affine = self.pairs.iter().cloned();
        let affine = affine.map(|(map, quality)| (ResidualMap::Affine(map), MapQuality::Affine(quality)));
        let autoencoders = self.autoencoders.iter().cloned();
        affine
            .chain(autoencoders.map(|(map, quality)| (ResidualMap::Autoencoder(map), MapQuality::Autoencoder(quality))))
            .collect()
    }

    /// As the metadata has it.
    fn replacement(
        &self,
        source: &LayerStack,
        target: LayerIndex,
    ) -> Result<Option<ReplacementDescription>, GuardError> {
        let Some(measured) = self.replacements.get(&(source.clone(), target)) else { return Ok(None) };
        let ReplacementQuality { kl, kl_mean_ablation, replaced, n_tokens, n_documents } = *measured;
        if ![kl, kl_mean_ablation, replaced].iter().all(|figure| figure.is_finite()) {
            let found = format!("others in the replacement of the pair {source}-{target}");
            return Err(GuardError::value("finite quality figures", found));
        }
        Ok(Some(ReplacementDescription { kl, kl_mean_ablation, replaced, n_tokens, n_documents }))
    }

    /// Source and target layer of each affine map.
    pub fn affine_pairs(&self) -> Vec<(LayerStack, LayerIndex)> {
        self.pairs.iter().map(|(map, _)| (map.source_layer().clone(), map.target_layer())).collect()
    }

    /// Source and target layer of each autoencoder.
    pub fn autoencoder_pairs(&self) -> Vec<(LayerStack, LayerIndex)> {
        self.autoencoders.iter().map(|(map, _)| (map.source_layer().into(), map.target_layer())).collect()
    }

    /// The same file for the same pairs, in whatever order.
    ///
    /// # Errors
    /// A pair of layers twice, a quality figure that is not finite, or a backward weight without its quality.
    pub fn to_bytes(&self) -> Result<Vec<u8>, GuardError> {
        let mut metadata = BTreeMap::from([
            ("format".to_owned(), FORMAT.to_owned()),
            ("source".to_owned(), json(&self.source)),
            ("target".to_owned(), json(&self.target)),
            ("corpus".to_owned(), self.corpus.clone()),
            ("seed".to_owned(), self.seed.to_string()),
        ]);
        let mut tensors = BTreeMap::new();
        for (map, quality) in &self.pairs {
            let pair = format!("{}-{}", map.source_layer(), map.target_layer());
            if quality.backward.is_some() != map.backward().is_some() {
                let found = format!("one without the other for the pair {pair}");
                return Err(GuardError::value("a backward weight and its quality, or neither", found));
            }
            let backward = quality.backward.map(|fit| [fit.lambda, fit.fraction_unexplained, fit.cosine]);
            let forward = [quality.lambda, quality.fraction_unexplained, quality.cosine];
            for figure in forward.into_iter().chain(backward.into_iter().flatten()) {
                if !figure.is_finite() {
                    return Err(GuardError::value("finite quality figures", format!("{figure} for the pair {pair}")));
                }
            }
            let description = Description::Affine(AffineDescription {
                lambda: quality.lambda,
                fraction_unexplained: quality.fraction_unexplained,
                cosine: quality.cosine,
                n_train: quality.n_train,
                n_heldout: quality.n_heldout,
                backward: backward.map(|[lambda, fraction_unexplained, cosine]| BackwardDescription {
                    lambda,
                    fraction_unexplained,
                    cosine,
                }),
                replacement: self.replacement(map.source_layer(), map.target_layer())?,
                rank: map.factors().map(|factors| factors.rank),
                correction: map.is_correction(),
            });
            if metadata.insert(pair.clone(), json(&description)).is_some() {
                return Err(GuardError::Duplicate { what: "pair of layers", name: pair });
            }
            if map.backward().is_some() && map.factors().is_some() != map.backward_factors().is_some() {
                let found = format!("one without the other for the pair {pair}");
                return Err(GuardError::value("a weight and a backward weight of low rank, or neither", found));
            }
            let (source, target) = (map.source_width(), map.target_width());
            put_weight(&mut tensors, &pair, "", [source, target], map.weight(), map.factors());
            if let Some(values) = map.backward() {
                put_weight(&mut tensors, &pair, "backward", [target, source], values, map.backward_factors());
            }
            for (part, values) in [
                ("source_mean", &map.source().mean),
                ("source_scale", &map.source().scale),
                ("target_mean", &map.target().mean),
                ("target_scale", &map.target().scale),
            ] {
                tensors.insert(format!("{pair}.{part}"), TensorData { shape: vec![values.len()], values });
            }
        }
        for (map, quality) in &self.autoencoders {
            let pair = format!("{}-{}", map.source_layer(), map.target_layer());
            let AutoencoderQuality { fraction_unexplained, cosine, n_train, n_heldout } = *quality;
            if !(fraction_unexplained.is_finite() && cosine.is_finite()) {
                return Err(GuardError::value("finite quality figures", format!("others for the pair {pair}")));
            }
            let replacement = self.replacement(&map.source_layer().into(), map.target_layer())?;
            let description = AutoencoderDescription { fraction_unexplained, cosine, n_train, n_heldout, replacement };
            if metadata.insert(pair.clone(), json(&Description::Autoencoder(description))).is_some() {
                return Err(GuardError::Duplicate { what: "pair of layers", name: pair });
            }
            let (source, target, hidden) = (map.source_width(), map.target_width(), map.hidden_width());
            let AutoencoderWeights { encoder, encoder_bias, decoder, decoder_bias } = map.weights();
            for (part, shape, values) in [
                ("encoder", vec![hidden, source], encoder),
                ("encoder_bias", vec![hidden], encoder_bias),
                ("decoder", vec![target, hidden], decoder),
                ("decoder_bias", vec![target], decoder_bias),
                ("source_mean", vec![source], &map.source().mean),
                ("source_scale", vec![source], &map.source().scale),
                ("target_mean", vec![target], &map.target().mean),
                ("target_scale", vec![target], &map.target().scale),
            ] {
                tensors.insert(format!("{pair}.{part}"), TensorData { shape, values });
            }
        }
        Ok(tensors::to_bytes(&metadata, &tensors))
    }

    /// `file` is what errors call it.
    ///
    /// # Errors
    /// Bytes that are not such a file, or a map that [`AffineMap::new`] refuses.
    pub fn from_bytes(file: &str, bytes: &[u8]) -> Result<Self, GuardError> {
        let tensors = TensorFile::parse(file, bytes)?;
        let mut described = tensors.described();
        described.format(FORMAT)?;
        let (source, target) = (described.json("source")?, described.json("target")?);
        let corpus = described.text("corpus")?.to_owned();
        let seed = described.parsed("seed")?;
        let (mut pairs, mut autoencoders, mut expected) = (Vec::new(), Vec::new(), 0);
        let mut replacements = BTreeMap::new();
        for key in described.keys() {
            let layers = layers_of(&key).ok_or_else(|| described.problem(&key, "unknown".to_owned()))?;
            let replacement = match described.json(&key)? {
                Description::Affine(AffineDescription {
                    lambda,
                    fraction_unexplained,
                    cosine,
                    n_train,
                    n_heldout,
                    backward,
                    replacement,
                    rank,
                    correction,
                }) => {
                    let backward = backward.map(|BackwardDescription { lambda, fraction_unexplained, cosine }| {
                        FitQuality { lambda, fraction_unexplained, cosine }
                    });
                    let quality = MappingQuality { lambda, fraction_unexplained, cosine, n_train, n_heldout, backward };
                    expected += 4 + (1 + usize::from(backward.is_some())) * if rank.is_some() { 2 } else { 1 };
                    let layers = layers.clone();
                    let map = read_affine(file, &tensors, &key, layers, backward.is_some(), rank)?;
                    let corrected = |map: AffineMap| map.into_correction().map_err(|error| refused(file, &key, &error));
                    pairs.push((if correction { corrected(map)? } else { map }, quality));
                    replacement
                }
                Description::Autoencoder(description) => {
                    let AutoencoderDescription { fraction_unexplained, cosine, n_train, n_heldout, replacement } =
                        description;
                    let quality = AutoencoderQuality { fraction_unexplained, cosine, n_train, n_heldout };
                    expected += 8;
                    let one = layers.0.single();
                    let source =
                        one.ok_or_else(|| described.problem(&key, "an autoencoder of several layers".to_owned()));
                    autoencoders.push((read_autoencoder(file, &tensors, &key, (source?, layers.1))?, quality));
                    replacement
                }
            };
            if let Some(measured) = replacement {
                let ReplacementDescription { kl, kl_mean_ablation, replaced, n_tokens, n_documents } = measured;
                let measured = ReplacementQuality { kl, kl_mean_ablation, replaced, n_tokens, n_documents };
                replacements.insert(layers, measured);
            }
        }
        // Every pair has read all of its own, and no two share any.
        let found = tensors.names().len();
        if found != expected {
            let reason = format!("the pairs of layers in its metadata have {expected} tensors, it has {found}");
            return Err(GuardError::Safetensors { file: shown(file), reason });
        }
        pairs.sort_by_key(|(map, _): &(AffineMap, _)| (map.source_layer().clone(), map.target_layer()));
        autoencoders.sort_by_key(|(map, _)| (map.source_layer(), map.target_layer()));
        Ok(Self { source, target, corpus, seed, pairs, autoencoders, replacements })
    }
}

/// A vector of the map's source as one of its target. An affine map pushes a direction forward and pulls a discriminant back. An autoencoder,
/// which is not linear, carries the direction between two classes as `f(h₊) − f(h₋)`, `h±` the classes' means, and never as `f(v)` (arXiv
/// 2503.04429, App. D): `v` is no residual, so the autoencoder has learnt nothing of it.
///
/// # Errors
/// A map and a vector that do not go together.
pub fn carry(
    map: &ResidualMap,
    kind: VectorKind,
    values: &[f32],
    class_means: Option<&ClassMeans>,
) -> Result<Vec<f32>, CarryError> {
    match (map, kind) {
        (ResidualMap::Affine(map), VectorKind::Direction) => Ok(map.apply_direction(values)),
        (ResidualMap::Affine(map), VectorKind::Discriminant) => map.pull_back(values).ok_or(CarryError::NoBackward),
        (ResidualMap::Autoencoder(map), VectorKind::Direction) => {
            let ClassMeans { positive, negative } = class_means.ok_or(CarryError::NoClassMeans)?;
            let mapped = |mean: &[f32]| map.apply(&mean.iter().map(|value| f64::from(*value)).collect::<Vec<_>>());
            Ok(mapped(positive).iter().zip(mapped(negative)).map(|(p, n)| (p - n) as f32).collect())
        }
        (ResidualMap::Autoencoder(_), VectorKind::Discriminant) => Err(CarryError::Discriminant),
    }
}

/// Why a map can't carry a vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CarryError {
    #[error(
        "it is a discriminant, and the mapping can carry directions only: make the mapping anew with `pilotfish map`"
    )]
    NoBackward,
    #[error(
        "an autoencoder carries the means of its classes, which are not there: make the vector anew with `pilotfish extract --method mean`"
    )]
    NoClassMeans,
    #[error(
        "it is a discriminant, which an autoencoder can't carry: take an affine mapping, or a direction (`--method mean`)"
    )]
    Discriminant,
}

fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("strings and finite numbers are JSON")
}

/// `24-10` or `14+16-10` as layers; no other spelling of them.
fn layers_of(key: &str) -> Option<(LayerStack, LayerIndex)> {
    let (source, target) = key.split_once('-')?;
    let (source, target) = (source.parse::<LayerStack>().ok()?, target.parse::<LayerStack>().ok()?.single()?);
    Some((source, target))
}

fn read_affine(
    file: &str,
    tensors: &TensorFile<'_>,
    pair: &str,
    (source_layer, target_layer): (LayerStack, LayerIndex),
    backward: bool,
    rank: Option<usize>,
) -> Result<AffineMap, GuardError> {
    let weight = format!("{pair}.weight");
    let (source_width, target_width) = match rank {
        Some(_) => (
            bounded(file, tensors, &factor_name(pair, "", "left"))?.0,
            bounded(file, tensors, &factor_name(pair, "", "right"))?.1,
        ),
        None => bounded(file, tensors, &weight)?,
    };
    let source = standardization(tensors, pair, "source", source_width)?;
    let target = standardization(tensors, pair, "target", target_width)?;
    let refused = |error| refused(file, pair, &error);
    let Some(rank) = rank else {
        let weight = tensors.shaped(&weight, &[source_width, target_width])?;
        let map = AffineMap::new(source_layer, target_layer, source, target, weight).map_err(refused)?;
        if !backward {
            return Ok(map);
        }
        let weight = tensors.shaped(&format!("{pair}.backward"), &[target_width, source_width])?;
        return map.with_backward(weight).map_err(refused);
    };
    let factors = |which, rows, columns| -> Result<Factors, GuardError> {
        let left = tensors.shaped(&factor_name(pair, which, "left"), &[rows, rank])?;
        let right = tensors.shaped(&factor_name(pair, which, "right"), &[rank, columns])?;
        Ok(Factors { rank, left, right })
    };
    let forward = factors("", source_width, target_width)?;
    let map = AffineMap::of_low_rank(source_layer, target_layer, source, target, forward).map_err(refused)?;
    if !backward {
        return Ok(map);
    }
    map.with_low_rank_backward(factors("backward", target_width, source_width)?).map_err(refused)
}

/// `S-T.left` for the weight, `S-T.backward_left` for the backward weight.
fn factor_name(pair: &str, which: &str, side: &str) -> String {
    if which.is_empty() { format!("{pair}.{side}") } else { format!("{pair}.{which}_{side}") }
}

fn put_weight<'a>(
    tensors: &mut BTreeMap<String, TensorData<'a>>,
    pair: &str,
    which: &str,
    shape: [usize; 2],
    weight: &'a [f32],
    factors: Option<&'a Factors>,
) {
    let Some(Factors { rank, left, right }) = factors else {
        let name = if which.is_empty() { "weight" } else { which };
        tensors.insert(format!("{pair}.{name}"), TensorData { shape: shape.to_vec(), values: weight });
        return;
    };
    tensors.insert(factor_name(pair, which, "left"), TensorData { shape: vec![shape[0], *rank], values: left });
    tensors.insert(factor_name(pair, which, "right"), TensorData { shape: vec![*rank, shape[1]], values: right });
}

fn read_autoencoder(
    file: &str,
    tensors: &TensorFile<'_>,
    pair: &str,
    (source_layer, target_layer): (LayerIndex, LayerIndex),
) -> Result<Autoencoder, GuardError> {
    let [encoder, decoder] = ["encoder", "decoder"].map(|part| format!("{pair}.{part}"));
    let (hidden, source_width) = bounded(file, tensors, &encoder)?;
    let (target_width, _) = bounded(file, tensors, &decoder)?;
    let weights = AutoencoderWeights {
        encoder: tensors.shaped(&encoder, &[hidden, source_width])?,
        encoder_bias: tensors.shaped(&format!("{pair}.encoder_bias"), &[hidden])?,
        decoder: tensors.shaped(&decoder, &[target_width, hidden])?,
        decoder_bias: tensors.shaped(&format!("{pair}.decoder_bias"), &[target_width])?,
    };
    let source = standardization(tensors, pair, "source", source_width)?;
    let target = standardization(tensors, pair, "target", target_width)?;
    Autoencoder::new(source_layer, target_layer, source, target, weights).map_err(|error| refused(file, pair, &error))
}

/// Rows and columns of a matrix, no larger than widths may be.
fn bounded(file: &str, tensors: &TensorFile<'_>, tensor: &str) -> Result<(usize, usize), GuardError> {
    let (rows, columns) = tensors.matrix_shape(tensor)?;
    if rows.max(columns) > MAX_WIDTH {
        let reason = format!("tensor `{tensor}` is wider than {MAX_WIDTH}");
        return Err(GuardError::Safetensors { file: shown(file), reason });
    }
    Ok((rows, columns))
}

fn standardization(
    tensors: &TensorFile<'_>,
    pair: &str,
    side: &str,
    width: usize,
) -> Result<Standardization, GuardError> {
    Ok(Standardization {
        mean: tensors.shaped(&format!("{pair}.{side}_mean"), &[width])?,
        scale: tensors.shaped(&format!("{pair}.{side}_scale"), &[width])?,
    })
}

fn refused(file: &str, pair: &str, error: &MappingError) -> GuardError {
    GuardError::Safetensors { file: shown(file), reason: format!("pair of layers {pair}: {error}") }
}
