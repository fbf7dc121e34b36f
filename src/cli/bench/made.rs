//! Guards made up for timing: random directions and maps for whatever model is at hand, with strengths so small that its answers stay.

use crate::cli::args::{MadeGuardArgument, PointsArgument};
use pilotfish::engine::Model;
use pilotfish::guard::manifest::{
    GateEntry, InterventionEntry, InterventionName, MappingEntry, MappingKind, Scope, VectorEntry,
};
use pilotfish::guard::{
    Aggregate, Digest, Guard, GuardError, MAPPING_SUFFIX, Manifest, MappingFile, OnFire, Readout, write_guard,
};
use pilotfish::mapping::{
    AffineMap, Autoencoder, AutoencoderQuality, AutoencoderWeights, MappingError, MappingQuality, Standardization,
};
use pilotfish::steering::VectorKind;
use pilotfish::tensor::LayerIndex;
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::path::Path;

/// Small beside any residual, and large enough that no compiler takes it for nothing.
const STRENGTH: f64 = 1e-6;
const MAPPING: &str = "map";

/// Layers of a model of `n_layer` for `points` hook points, spread evenly, without the last where that is possible: llama.cpp computes it for
/// fewer tokens.
pub fn layers(points: PointsArgument, n_layer: u32) -> Vec<LayerIndex> {
    match points {
        PointsArgument::All => (0..n_layer).map(LayerIndex).collect(),
        PointsArgument::Number(n) => {
            let n = n.min(n_layer);
            (1..=n).map(|index| LayerIndex((index * n_layer / (n + 1)).min(n_layer - 1))).collect()
        }
    }
}

/// A guard for `model` that does `what` at each of `layers`. Gates are open from the prompt's end on.
pub fn guard(model: &Model, what: MadeGuardArgument, layers: &[LayerIndex], folder: &Path) -> anyhow::Result<Guard> {
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let width = model.shape().n_embd.0;
    let identity = model.identity();
    let mut manifest = Manifest::new("made-for-timing", identity);
    let mut maps = MappingFile {
        source: identity.clone(),
        target: identity.clone(),
        corpus: "none: random, for timing".into(),
        seed: 0,
        pairs: Vec::new(),
        autoencoders: Vec::new(),
        replacements: Default::default(),
    };
    let mut tensors = Vec::new();
    for layer in layers {
        let name = format!("at.{layer}");
        tensors.push((name.clone(), random(&mut rng, width, 1.0)));
        manifest.vectors.push(vector(&name, *layer));
        let gated = matches!(what, MadeGuardArgument::Gate | MadeGuardArgument::GatedAdd);
        if gated {
            manifest.gates.push(gate(&name));
        }
        let kind = match what {
            MadeGuardArgument::Gate => continue,
            MadeGuardArgument::Add | MadeGuardArgument::GatedAdd => InterventionName::Add,
            MadeGuardArgument::Ablate => InterventionName::Ablate,
            MadeGuardArgument::Clamp => InterventionName::Clamp,
            MadeGuardArgument::Rotate => InterventionName::Rotate,
            MadeGuardArgument::Switch => {
                maps.pairs.push(affine(&mut rng, *layer, width)?);
                InterventionName::Switch
            }
            MadeGuardArgument::Autoencoder => {
                maps.autoencoders.push(autoencoder(&mut rng, *layer, width)?);
                InterventionName::Switch
            }
        };
        let operand = if kind == InterventionName::Switch { format!("{MAPPING}.{layer}") } else { name.clone() };
        let bound = |side: f64| (kind == InterventionName::Clamp).then_some(side);
        manifest.interventions.push(InterventionEntry {
            strength: STRENGTH,
            when: gated.then(|| name.clone()),
            low: bound(-1.0),
            high: bound(1.0),
            angle: (kind == InterventionName::Rotate).then_some(90.0),
            ..InterventionEntry::new(kind, operand)
        });
    }
    let mappings = mappings(&mut manifest, &maps, layers)?;
    Ok(write_guard(folder, &manifest, &tensors, &mappings)?)
}

fn mappings(
    manifest: &mut Manifest,
    maps: &MappingFile,
    layers: &[LayerIndex],
) -> Result<Vec<(String, Vec<u8>)>, GuardError> {
    let kind = match (maps.pairs.is_empty(), maps.autoencoders.is_empty()) {
        (true, true) => return Ok(Vec::new()),
        (false, _) => MappingKind::Affine,
        (true, false) => MappingKind::Autoencoder,
    };
    let bytes = maps.to_bytes()?;
    manifest.mappings.extend(layers.iter().map(|layer| MappingEntry {
        name: format!("{MAPPING}.{layer}"),
        sha256: Digest::of(&bytes),
        kind,
        source_layer: (*layer).into(),
        target_layer: *layer,
    }));
    Ok(vec![(format!("{MAPPING}{MAPPING_SUFFIX}"), bytes)])
}

fn vector(name: &str, layer: LayerIndex) -> VectorEntry {
    VectorEntry {
        name: name.into(),
        layer: layer.into(),
        tensor: name.into(),
        kind: VectorKind::Direction,
        mapping: None,
        method: None,
        mean_norm: None,
    }
}

/// A gate that every prompt opens.
fn gate(vector: &str) -> GateEntry {
    GateEntry {
        name: vector.into(),
        vector: vector.into(),
        scope: Scope::Prompt,
        aggregate: Some(Aggregate::Last),
        positions: None,
        release: None,
        readout: Readout::Projection,
        threshold: Some(-1e9),
        mean: Some(0.0),
        deviation: Some(1.0),
        on_fire: OnFire::Steer,
        calibrations: Vec::new(),
    }
}

fn random(rng: &mut impl Rng, n: usize, size: f32) -> Vec<f32> {
    (0..n).map(|_| rng.random_range(-size..size)).collect()
}

fn plain(width: usize) -> Standardization {
    Standardization { mean: vec![0.0; width], scale: vec![1.0; width] }
}

/// Of the size that keeps a random row's norm.
fn spread(width: usize) -> f32 {
    (3.0 / width as f32).sqrt()
}

fn affine(rng: &mut impl Rng, layer: LayerIndex, width: usize) -> Result<(AffineMap, MappingQuality), MappingError> {
    let weight = random(rng, width * width, spread(width));
    let map = AffineMap::new(layer, layer, plain(width), plain(width), weight)?;
    let (n_train, n_heldout) = (0, 0);
    let quality =
        MappingQuality { lambda: 0.0, fraction_unexplained: 1.0, cosine: 0.0, n_train, n_heldout, backward: None };
    Ok((map, quality))
}

/// Of the hidden width that the paper has between equal widths: theirs.
fn autoencoder(
    rng: &mut impl Rng,
    layer: LayerIndex,
    width: usize,
) -> Result<(Autoencoder, AutoencoderQuality), MappingError> {
    let weights = AutoencoderWeights {
        encoder: random(rng, width * width, spread(width)),
        encoder_bias: random(rng, width, 0.1),
        decoder: random(rng, width * width, spread(width)),
        decoder_bias: random(rng, width, 0.1),
    };
    let map = Autoencoder::new(layer, layer, plain(width), plain(width), weights)?;
    Ok((map, AutoencoderQuality { fraction_unexplained: 1.0, cosine: 0.0, n_train: 0, n_heldout: 0 }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_are_spread_over_the_model() {
        let at = |points, n_layer| layers(points, n_layer).into_iter().map(|layer| layer.0).collect::<Vec<_>>();
        assert_eq!(at(PointsArgument::Number(1), 30), [15]);
        assert_eq!(at(PointsArgument::Number(3), 30), [7, 15, 22]);
        assert_eq!(at(PointsArgument::Number(9), 4), at(PointsArgument::All, 4));
        assert_eq!(at(PointsArgument::Number(1), 1), [0]);
    }
}
