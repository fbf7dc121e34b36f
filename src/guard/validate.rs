//! From what a manifest says to what a guard is: every reference resolved, every number checked, every vector in target space.

use super::error::{GuardError, listed, shown};
use super::folder::Files;
use super::manifest::{
    GateEntry, InterventionEntry, InterventionName, Manifest, MappingEntry, MappingKind, Readout, Scope, VectorEntry,
    text_of,
};
use super::tensors::TensorFile;
use super::{
    Calibration, Digest, Gate, GateCalibration, GateScope, Guard, GuardVector, Intervention, InterventionKind,
    MAX_ENTRIES, MappedFrom, MappingFile, Positions, Probe, Rule, StrengthUnit, SwitchMap, Target, carry,
    class_mean_tensors, location, multiplier, rule,
};
use crate::steering::{ClassMeans, PromptTokens, VectorKind};
use crate::tensor::norm;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

/// Characters a name may have.
const MAX_NAME: usize = 64;

/// A guard from its manifest's bytes and its other files.
pub(super) fn guard(file: &str, bytes: &[u8], files: &impl Files) -> Result<Guard, GuardError> {
    let manifest = Manifest::parse(file, bytes)?;
    let text = text_of(file, bytes)?;
    let check = Check { manifest: &manifest, files };
    let Manifest { name, description, on_error, message, target, source, results, .. } = &manifest;
    check.parts().map_err(|Problem { key, reason }| location::at_key(file, text, &key, reason)).map(
        |Parts { vectors, switches, gates, interventions }| Guard {
            name: name.clone(),
            description: description.clone(),
            on_error: *on_error,
            message: message.clone(),
            target: Target {
                architecture: target.architecture.clone(),
                fingerprint: target.fingerprint,
                probe: target.probe.clone(),
                adapters: target.adapters.clone(),
            },
            source: source.clone(),
            vectors,
            switches,
            gates,
            interventions,
            results: results.clone(),
            content_hash: Digest::of(bytes),
        },
    )
}

/// What is wrong, and at which key.
struct Problem {
    key: String,
    reason: Box<GuardError>,
}

trait At<T> {
    fn at(self, key: impl Into<String>) -> Result<T, Problem>;
}

impl<T> At<T> for Result<T, GuardError> {
    fn at(self, key: impl Into<String>) -> Result<T, Problem> {
        self.map_err(|reason| Problem { key: key.into(), reason: Box::new(reason) })
    }
}

struct Parts {
    vectors: Vec<GuardVector>,
    switches: Vec<SwitchMap>,
    gates: Vec<Gate>,
    interventions: Vec<Intervention>,
}

struct Check<'a, F> {
    manifest: &'a Manifest,
    files: &'a F,
}

impl<F: Files> Check<'_, F> {
    fn parts(&self) -> Result<Parts, Problem> {
        self.head()?;
        self.lists()?;
        let mappings = self.mappings()?;
        let vectors = self.vectors(&mappings)?;
        let switches = self.switches(&mappings, &vectors)?;
        if let Some(probe) = &self.manifest.target.probe {
            check_probe(probe, &vectors)?;
        }
        let gates = self.gates(&vectors)?;
        let interventions = self.interventions(&vectors, &switches, &gates)?;
        if gates.is_empty() && interventions.is_empty() {
            return Err(GuardError::Idle).at("name");
        }
        Ok(Parts { vectors, switches, gates, interventions })
    }

    fn head(&self) -> Result<(), Problem> {
        let Manifest { name, description, message, target, source, results, tensors, .. } = self.manifest;
        check_guard_name(name).at("name")?;
        check_text(description).at("description")?;
        message.as_deref().map_or(Ok(()), check_text).at("message")?;
        check_label(&target.architecture).at("target.architecture")?;
        if target.adapters.len() > MAX_ENTRIES {
            let found = format!("{} entries", target.adapters.len());
            return Err(GuardError::value(format!("at most {MAX_ENTRIES} entries"), found)).at("target.adapters");
        }
        for (index, adapter) in target.adapters.iter().enumerate() {
            let at = |key: &str| format!("target.adapters[{index}].{key}");
            check_label(&adapter.name).at(at("name"))?;
            finite_f32(adapter.scale).at(at("scale"))?;
        }
        if let Some(source) = source {
            check_label(&source.model).at("source.model")?;
        }
        check_file_name(&tensors.file, ".safetensors").at("tensors.file")?;
        for (index, result) in results.iter().enumerate() {
            let at = |key: &str| format!("result[{index}].{key}");
            check_label(&result.name).at(at("name"))?;
            check_text(&result.on).at(at("on"))?;
            check_finite(result.value).at(at("value"))?;
            result.command.as_deref().map_or(Ok(()), check_text).at(at("command"))?;
        }
        Ok(())
    }

    /// Lengths of the lists, and names that are names and there once.
    fn lists(&self) -> Result<(), Problem> {
        let Manifest { vectors, mappings, gates, interventions, results, .. } = self.manifest;
        let intervention_names = interventions.iter().map(intervention_name).collect();
        let lists: [(&'static str, Vec<&str>); 4] = [
            ("vector", vectors.iter().map(|entry| entry.name.as_str()).collect()),
            ("mapping", mappings.iter().map(|entry| entry.name.as_str()).collect()),
            ("gate", gates.iter().map(|entry| entry.name.as_str()).collect()),
            ("intervention", intervention_names),
        ];
        for (what, length) in lists.iter().map(|(what, names)| (*what, names.len())).chain([("result", results.len())])
        {
            if length > MAX_ENTRIES {
                return Err(GuardError::value(format!("at most {MAX_ENTRIES} entries"), length)).at(what);
            }
        }
        for (what, names) in lists {
            let mut seen = BTreeSet::new();
            for (index, name) in names.into_iter().enumerate() {
                let key = || format!("{what}[{index}].name");
                if what == "intervention" && name.is_empty() && interventions[index].name.is_none() {
                    // It says neither a name nor what it works with, which is told by kind below.
                    continue;
                }
                check_name(name).at(key())?;
                if what == "gate" && rule::RESERVED.contains(&name) {
                    return Err(GuardError::value("a name that is no word of rules", format!("`{name}`"))).at(key());
                }
                if !seen.insert(name) {
                    return Err(GuardError::Duplicate { what, name: name.to_owned() }).at(key());
                }
            }
        }
        Ok(())
    }

    fn vectors(&self, mappings: &Mappings) -> Result<Vec<GuardVector>, Problem> {
        let Manifest { vectors: entries, tensors, .. } = self.manifest;
        let bytes = self.files.tensors(&tensors.file).at("tensors.file")?;
        let found = Digest::of(&bytes);
        if found != tensors.sha256 {
            let file = tensors.file.clone();
            return Err(GuardError::Sha256 { file, expected: tensors.sha256, found }).at("tensors.sha256");
        }
        let file = TensorFile::parse(&tensors.file, &bytes).at("tensors.file")?;
        let mut vectors: Vec<GuardVector> = Vec::with_capacity(entries.len());
        for (index, entry) in entries.iter().enumerate() {
            let vector = self.vector(index, entry, &file, mappings)?;
            if let Some(first) = vectors.first().filter(|first| first.direction.len() != vector.direction.len()) {
                let (expected, found) = (first.direction.len(), vector.direction.len());
                let (vector, other) = (vector.name, first.name.clone());
                let reason = GuardError::TargetWidth { vector, other, expected, found };
                return Err(reason).at(format!("vector[{index}].tensor"));
            }
            vectors.push(vector);
        }
        Ok(vectors)
    }

    fn vector(
        &self,
        index: usize,
        entry: &VectorEntry,
        tensors: &TensorFile<'_>,
        mappings: &Mappings,
    ) -> Result<GuardVector, Problem> {
        let at = |key: &str| format!("vector[{index}].{key}");
        entry.method.as_deref().map_or(Ok(()), check_label).at(at("method"))?;
        entry.mean_norm.map_or(Ok(()), check_finite).at(at("mean_norm"))?;
        let values = tensors.direction(&entry.tensor).at(at("tensor"))?;
        let vector = |layer, direction, mapped_from| GuardVector {
            name: entry.name.clone(),
            layer,
            direction,
            kind: entry.kind,
            mapped_from,
            method: entry.method.clone(),
            mean_norm: entry.mean_norm,
        };
        let Some(name) = &entry.mapping else {
            let one = "one layer, for a vector without a mapping";
            let layer = entry.layer.single().ok_or_else(|| GuardError::value(one, &entry.layer)).at(at("layer"))?;
            return Ok(vector(layer, values, None));
        };

        let mapping = self.mapping(name).at(at("mapping"))?;
        if entry.layer != mapping.source_layer {
            let expected = format!("{}, the source layer of mapping `{name}`", mapping.source_layer);
            return Err(GuardError::value(expected, &entry.layer)).at(at("layer"));
        }
        let pair = mappings
            .get(&mapping.sha256)
            .and_then(|(_, file)| file.map_with_quality(mapping.kind, &mapping.source_layer, mapping.target_layer))
            .ok_or_else(|| self.no_mapping(mapping.sha256));
        let (map, quality) = pair.at(at("mapping"))?;
        if values.len() != map.source_width() {
            let (vector, mapping) = (entry.name.clone(), name.clone());
            let (expected, found) = (map.source_width(), values.len());
            return Err(GuardError::MappingWidth { vector, mapping, expected, found }).at(at("tensor"));
        }
        let class_means = class_means(tensors, &entry.tensor, values.len()).at(at("tensor"))?;
        let direction = carry(&map, entry.kind, &values, class_means.as_ref()).map_err(|reason| GuardError::Carry {
            vector: entry.name.clone(),
            mapping: name.clone(),
            reason,
        });
        let direction = direction.at(at("mapping"))?;
        let problem = match norm(&direction) {
            length if !length.is_finite() || direction.iter().any(|value| !value.is_finite()) => "too large for `f32`",
            0.0 => "zero, so it has no direction",
            _ => {
                let (layer, mapping, target) = (entry.layer.clone(), name.clone(), map.target().clone());
                let from = MappedFrom { layer, mapping, quality, target };
                return Ok(vector(map.target_layer(), direction, Some(from)));
            }
        };
        let (vector, mapping) = (entry.name.clone(), name.clone());
        Err(GuardError::MappedVector { mapping, vector, problem }).at(at("mapping"))
    }

    /// The manifest's mapping of that name.
    fn mapping(&self, name: &str) -> Result<&MappingEntry, GuardError> {
        let known = &self.manifest.mappings;
        let unknown = || GuardError::unknown("mapping", name, known.iter().map(|mapping| &mapping.name));
        known.iter().find(|mapping| mapping.name == *name).ok_or_else(unknown)
    }

    /// Whether the mapping of that name carries a vector, or serves none at all: then it is between the guard's two models.
    fn carries(&self, name: &str) -> bool {
        let Manifest { vectors, interventions, .. } = self.manifest;
        vectors.iter().any(|vector| vector.mapping.as_deref() == Some(name))
            || !interventions.iter().any(|intervention| intervention.mapping.as_deref() == Some(name))
    }

    /// The manifest's mapping files by sha256, each checked to be between models of the guard and to have the pairs of layers asked of it.
    fn mappings(&self) -> Result<Mappings, Problem> {
        let Manifest { mappings: entries, source, target, vectors, .. } = self.manifest;
        if source.is_none()
            && let Some(index) = vectors.iter().position(|vector| vector.mapping.is_some())
        {
            let why = "a vector with a mapping needs the table `source`, which says what model it was learnt on";
            return Err(GuardError::Missing { why: why.to_owned() }).at(format!("vector[{index}].mapping"));
        }
        let wanted = entries.iter().map(|entry| entry.sha256).collect();
        let found = self.files.mappings(&wanted).at("mapping")?;
        let mut mappings = Mappings::new();
        for (index, entry) in entries.iter().enumerate() {
            let at = |key: &str| format!("mapping[{index}].{key}");
            if let Entry::Vacant(vacant) = mappings.entry(entry.sha256) {
                let known = found.get(&entry.sha256).ok_or_else(|| self.no_mapping(entry.sha256));
                let (file, bytes) = known.at(at("sha256"))?;
                let mapping = MappingFile::from_bytes(file, bytes).at(at("sha256"))?;
                vacant.insert((file.clone(), mapping));
            }
            let (file, mapping) = &mappings[&entry.sha256];
            let other = |side, side_of_guard, expected: &dyn ToString, found: &dyn ToString| {
                let (expected, found) = (shown(&expected.to_string()), shown(&found.to_string()));
                Err(GuardError::OtherModel { file: file.clone(), side, side_of_guard, expected, found })
                    .at(at("sha256"))
            };
            let (from, to) = (&mapping.source, &mapping.target);
            if self.carries(&entry.name) {
                if let Some(source) = source.as_ref().filter(|source| source.fingerprint != from.fingerprint) {
                    return other("from the model", "source", &source.fingerprint, &from.fingerprint);
                }
                if target.fingerprint != to.fingerprint {
                    return other("to the model", "target", &target.fingerprint, &to.fingerprint);
                }
                if target.architecture != to.architecture {
                    return other("to the architecture", "target", &target.architecture, &to.architecture);
                }
            } else if target.fingerprint != from.fingerprint {
                // A switch starts at the residual of the model that runs. What it leads to need not be a model that runs.
                return other("from the model", "target", &target.fingerprint, &from.fingerprint);
            }
            let (source, target) = (&entry.source_layer, entry.target_layer);
            let (there, pairs) = match entry.kind {
                MappingKind::Affine => (mapping.pair(source, target).is_some(), mapping.affine_pairs()),
                MappingKind::Autoencoder => {
                    let found = source.single().and_then(|source| mapping.autoencoder(source, target));
                    (found.is_some(), mapping.autoencoder_pairs())
                }
            };
            if !there {
                let known = listed(pairs.into_iter().map(|(source, target)| format!("{source} → {target}")));
                let (source_layer, target_layer) = (source.clone(), target.0);
                let kind = entry.kind.name();
                let reason = GuardError::NoLayerPair { file: file.clone(), kind, source_layer, target_layer, known };
                return Err(reason).at(at("source_layer"));
            }
        }
        Ok(mappings)
    }

    /// The maps that switches follow, each mapping once.
    fn switches(&self, mappings: &Mappings, vectors: &[GuardVector]) -> Result<Vec<SwitchMap>, Problem> {
        let mut switches: Vec<SwitchMap> = Vec::new();
        for (index, intervention) in self.manifest.interventions.iter().enumerate() {
            let at = |key: &str| format!("intervention[{index}].{key}");
            let switch = intervention.kind == InterventionName::Switch;
            let Some(name) = intervention.mapping.as_ref().filter(|_| switch) else { continue };
            if switches.iter().any(|known| known.name == *name) {
                continue;
            }
            let entry = self.mapping(name).at(at("mapping"))?;
            let (source, target) = (&entry.source_layer, entry.target_layer);
            if *source != target {
                let expected = "a mapping from a layer to the same layer";
                return Err(GuardError::value(expected, format!("one from {source} to {target}"))).at(at("mapping"));
            }
            let map = mappings.get(&entry.sha256).and_then(|(_, file)| file.map(entry.kind, source, target));
            let map = map.ok_or_else(|| self.no_mapping(entry.sha256)).at(at("mapping"))?;
            let width = vectors.first().map_or(map.source_width(), |vector| vector.direction.len());
            for found in [map.source_width(), map.target_width()] {
                if found != width {
                    let expected = format!("a mapping between residuals of {width} values");
                    return Err(GuardError::value(expected, format!("{found} values"))).at(at("mapping"));
                }
            }
            switches.push(SwitchMap { name: name.clone(), map });
        }
        Ok(switches)
    }

    fn no_mapping(&self, sha256: Digest) -> GuardError {
        GuardError::NoMapping { sha256, searched: self.files.searched() }
    }

    fn gates(&self, vectors: &[GuardVector]) -> Result<Vec<Gate>, Problem> {
        let gate = |(index, entry): (usize, &GateEntry)| {
            let at = |key: &str| format!("gate[{index}].{key}");
            let scope = scope_of(index, entry)?;
            let vector = find_vector(vectors, &entry.vector).at(at("vector"))?;
            entry.threshold.map_or(Ok(()), check_finite).at(at("threshold"))?;
            let calibration = match (entry.mean, entry.deviation) {
                (None, None) => None,
                (Some(mean), Some(deviation)) => {
                    check_finite(mean).at(at("mean"))?;
                    check_positive(deviation).at(at("deviation"))?;
                    Some(Calibration { mean, deviation })
                }
                (mean, _) => {
                    let (there, missing) = if mean.is_some() { ("mean", "deviation") } else { ("deviation", "mean") };
                    let why = format!("`{there}` is there without `{missing}`; `calibrate` sets both");
                    return Err(GuardError::Missing { why }).at(at(there));
                }
            };
            let direction = read_along(&vectors[vector], entry.readout).at(at("readout"))?;
            check_calibrations(index, entry)?;
            let GateEntry { name, readout, threshold, on_fire, calibrations, .. } = entry;
            let (name, readout, threshold, on_fire) = (name.clone(), *readout, *threshold, *on_fire);
            let calibrations = calibrations.clone();
            Ok(Gate { name, vector, scope, readout, direction, calibration, threshold, calibrations, on_fire })
        };
        self.manifest.gates.iter().enumerate().map(gate).collect()
    }

    fn interventions(
        &self,
        vectors: &[GuardVector],
        switches: &[SwitchMap],
        gates: &[Gate],
    ) -> Result<Vec<Intervention>, Problem> {
        let gate = |name: &str| {
            let known = || GuardError::unknown("gate", name, gates.iter().map(|gate| &gate.name));
            gates.iter().position(|gate| gate.name == *name).ok_or_else(known)
        };
        let intervention = |(index, entry): (usize, &InterventionEntry)| {
            let at = |key: &str| format!("intervention[{index}].{key}");
            let kind = kind_of(index, entry, vectors, switches)?;
            let deviation = deviation_of(index, entry)?;
            entry.positions.check().at(at("positions.matching"))?;
            Ok(Intervention {
                name: intervention_name(entry).to_owned(),
                kind,
                strength: strength(entry.strength, deviation, kind, vectors).at(at("strength"))?,
                deviation,
                positions: entry.positions.clone(),
                benign_tokens: entry.benign_tokens.clone().unwrap_or(PromptTokens::Mean),
                when: entry.when.as_ref().map(|when| Rule::parse(when, gate)).transpose().at(at("when"))?,
                first_position: entry.first_position,
            })
        };
        self.manifest.interventions.iter().enumerate().map(intervention).collect()
    }
}

/// Of the vector in `tensor`, of `width` values, where the file has them.
fn class_means(tensors: &TensorFile<'_>, tensor: &str, width: usize) -> Result<Option<ClassMeans>, GuardError> {
    let [positive, negative] = class_mean_tensors(tensor);
    let names = tensors.names();
    if !names.contains(&positive) && !names.contains(&negative) {
        return Ok(None);
    }
    let read = |name: &str| tensors.shaped(name, &[width]);
    Ok(Some(ClassMeans { positive: read(&positive)?, negative: read(&negative)? }))
}

/// Mapping files by sha256, with their names.
type Mappings = BTreeMap<Digest, (String, MappingFile)>;

fn scope_of(index: usize, entry: &GateEntry) -> Result<GateScope, Problem> {
    let at = |key: &str| format!("gate[{index}].{key}");
    let foreign = |key: &str, there: bool, owner: &str| match there {
        true => Err(GuardError::Misplaced { why: format!("it is a key of gates of scope `{owner}`") }).at(at(key)),
        false => Ok(()),
    };
    match entry.scope {
        Scope::Prompt => {
            foreign("positions", entry.positions.is_some(), "token")?;
            foreign("release", entry.release.is_some(), "token")?;
            Ok(GateScope::Prompt(entry.aggregate.unwrap_or_default()))
        }
        Scope::Token => {
            foreign("aggregate", entry.aggregate.is_some(), "prompt")?;
            if let Some(release) = entry.release {
                check_finite(release).at(at("release"))?;
                if let Some(threshold) = entry.threshold.filter(|threshold| release > *threshold) {
                    let expected = format!("at most the threshold, {threshold}");
                    return Err(GuardError::value(expected, release)).at(at("release"));
                }
            }
            if let Some(Positions::Matching(_)) = entry.positions {
                let why = "it is for interventions; a gate reads `all`, `prompt` or `generated` tokens".to_owned();
                return Err(GuardError::Misplaced { why }).at(at("positions.matching"));
            }
            let positions = entry.positions.clone().unwrap_or(Positions::All);
            Ok(GateScope::Token { positions, release: entry.release })
        }
    }
}

/// What a gate with this readout projects on.
fn read_along(vector: &GuardVector, readout: Readout) -> Result<Vec<f32>, GuardError> {
    if readout == Readout::Projection {
        return Ok(vector.direction.clone());
    }
    if vector.kind == VectorKind::Discriminant {
        let why = format!("a `direction`: vector `{}`, as a discriminant, weighs each dimension already", vector.name);
        return Err(GuardError::value(why, "the readout `standardized`"));
    }
    let from = vector.mapped_from.as_ref().ok_or_else(|| GuardError::Missing {
        why: format!(
            "the readout `standardized` needs a mapping, which knows the scale of each dimension; vector `{}` has none",
            vector.name
        ),
    })?;
    let direction = from.target.readout(&vector.direction);
    let problem = match norm(&direction) {
        length if !length.is_finite() || direction.iter().any(|value| !value.is_finite()) => "too large for `f32`",
        0.0 => "zero, so it has no direction",
        _ => return Ok(direction),
    };
    Err(GuardError::MappedVector { mapping: from.mapping.clone(), vector: vector.name.clone(), problem })
}

fn intervention_name(entry: &InterventionEntry) -> &str {
    let operand = || entry.vector.as_deref().or(entry.mapping.as_deref()).unwrap_or_default();
    entry.name.as_deref().unwrap_or_else(operand)
}

fn find_vector(vectors: &[GuardVector], name: &str) -> Result<usize, GuardError> {
    let unknown = || GuardError::unknown("vector", name, vectors.iter().map(|vector| &vector.name));
    vectors.iter().position(|vector| vector.name == name).ok_or_else(unknown)
}

fn kind_of(
    index: usize,
    entry: &InterventionEntry,
    vectors: &[GuardVector],
    switches: &[SwitchMap],
) -> Result<InterventionKind, Problem> {
    use InterventionName::{Ablate, Add, Clamp, Rotate, Switch};
    let at = |key: &str| format!("intervention[{index}].{key}");
    let keys: [(&str, bool, &[InterventionName], &str); 7] = [
        ("vector", entry.vector.is_some(), &[Add, Ablate, Clamp, Rotate], "the other kinds"),
        ("mapping", entry.mapping.is_some(), &[Switch], "`switch`"),
        ("mean", entry.mean.is_some(), &[Ablate], "`ablate`"),
        ("benign_tokens", entry.benign_tokens.is_some(), &[Ablate, Add], "`ablate` and `add`"),
        ("low", entry.low.is_some(), &[Clamp], "`clamp`"),
        ("high", entry.high.is_some(), &[Clamp], "`clamp`"),
        ("angle", entry.angle.is_some(), &[Rotate], "`rotate`"),
    ];
    for (key, there, owners, owner) in keys {
        if there && !owners.contains(&entry.kind) {
            return Err(GuardError::Misplaced { why: format!("it is a key of {owner}") }).at(at(key));
        }
    }
    let needs = |what: &str| GuardError::Missing { why: format!("`{}` needs {what}", entry.kind.name()) };
    let number = |key: &str, value: Option<f64>, what: &str| {
        let value = value.ok_or_else(|| needs(what)).at(at(key))?;
        finite_f32(value).at(at(key)).map(|()| value)
    };
    if entry.kind == Switch {
        let name = entry.mapping.as_ref().ok_or_else(|| needs("a `mapping`")).at(at("mapping"))?;
        let map = switches.iter().position(|known| known.name == *name);
        return map.map(|map| InterventionKind::Switch { map }).ok_or_else(|| needs("a `mapping`")).at(at("mapping"));
    }
    let name = entry.vector.as_ref().ok_or_else(|| needs("a `vector`")).at(at("vector"))?;
    let vector = find_vector(vectors, name).at(at("vector"))?;
    match entry.kind {
        Add => Ok(InterventionKind::Add { vector }),
        Ablate => {
            let mean = entry.mean.unwrap_or(0.0);
            finite_f32(mean).at(at("mean"))?;
            Ok(InterventionKind::Ablate { vector, mean })
        }
        Clamp => {
            let both = "both `low` and `high`";
            let (low, high) = (number("low", entry.low, both)?, number("high", entry.high, both)?);
            if low > high {
                return Err(GuardError::value(format!("at most `high`, {high}"), low)).at(at("low"));
            }
            Ok(InterventionKind::Clamp { vector, low, high })
        }
        Rotate => {
            let angle = number("angle", entry.angle, "an `angle`, in degrees")?;
            if !(-180.0..=180.0).contains(&angle) {
                return Err(GuardError::value("an angle from −180 to 180 degrees", angle)).at(at("angle"));
            }
            Ok(InterventionKind::Rotate { vector, angle })
        }
        Switch => unreachable!("handled above"),
    }
}

/// `strength` as an intervention holds it.
pub(super) fn strength(
    strength: f64,
    deviation: Option<f64>,
    kind: InterventionKind,
    vectors: &[GuardVector],
) -> Result<f32, GuardError> {
    finite_f32(strength)?;
    if let InterventionKind::Add { vector } = kind {
        let direction = &vectors[vector].direction;
        let scale = multiplier(strength, deviation, direction);
        if direction.iter().any(|value| !(scale * value).is_finite()) {
            return Err(GuardError::Strength { strength });
        }
    }
    Ok(strength as f32)
}

/// The deviation that the strength of an `add` is in units of, if it is.
fn deviation_of(index: usize, entry: &InterventionEntry) -> Result<Option<f64>, Problem> {
    let at = |key: &str| format!("intervention[{index}].{key}");
    match (entry.unit, entry.deviation) {
        (StrengthUnit::Vector, None) => Ok(None),
        (StrengthUnit::Vector, Some(_)) => {
            let why = "it is a key of `add` with `unit = \"deviation\"`".to_owned();
            Err(GuardError::Misplaced { why }).at(at("deviation"))
        }
        (StrengthUnit::Deviation, _) if entry.kind != InterventionName::Add => {
            Err(GuardError::Misplaced { why: "it is a key of `add`".to_owned() }).at(at("unit"))
        }
        (StrengthUnit::Deviation, None) => {
            let why = "the unit `deviation` needs a `deviation`; `calibrate --strength-sd` sets both".to_owned();
            Err(GuardError::Missing { why }).at(at("unit"))
        }
        (StrengthUnit::Deviation, Some(deviation)) => {
            check_positive(deviation).at(at("deviation"))?;
            Ok(Some(deviation))
        }
    }
}

fn check_calibrations(gate: usize, entry: &GateEntry) -> Result<(), Problem> {
    if entry.calibrations.len() > MAX_ENTRIES {
        let reason = GuardError::value(format!("at most {MAX_ENTRIES} entries"), entry.calibrations.len());
        return Err(reason).at(format!("gate[{gate}].calibration"));
    }
    let mut seen = BTreeSet::new();
    for (index, calibration) in entry.calibrations.iter().enumerate() {
        let at = |key: &str| format!("gate[{gate}].calibration[{index}].{key}");
        let GateCalibration { quantization, n_benign: _, mean, deviation, threshold, points } = calibration;
        check_label(quantization).at(at("quantization"))?;
        if !seen.insert(quantization) {
            let name = quantization.clone();
            return Err(GuardError::Duplicate { what: "calibration of", name }).at(at("quantization"));
        }
        check_finite(*mean).at(at("mean"))?;
        check_positive(*deviation).at(at("deviation"))?;
        check_finite(*threshold).at(at("threshold"))?;
        if points.len() > MAX_ENTRIES {
            let reason = GuardError::value(format!("at most {MAX_ENTRIES} entries"), points.len());
            return Err(reason).at(at("operating_point"));
        }
        for (index, point) in points.iter().enumerate() {
            let at = |key: &str| at(&format!("operating_point[{index}].{key}"));
            check_finite(point.threshold).at(at("threshold"))?;
            let shares = [("rate", Some(point.rate)), ("low", Some(point.low)), ("high", Some(point.high))];
            for (key, share) in shares.into_iter().chain([("detection", point.detection)]) {
                if let Some(found) = share.filter(|share| !(0.0..=1.0).contains(share)) {
                    return Err(GuardError::value("a share from 0 to 1", found)).at(at(key));
                }
            }
            if points[..index].iter().any(|other| other.rate == point.rate) {
                let name = point.rate.to_string();
                return Err(GuardError::Duplicate { what: "operating point", name }).at(at("rate"));
            }
        }
    }
    Ok(())
}

/// A direction of `width` finite values, not all of them zero.
pub(super) fn direction(values: &[f32], width: usize) -> Result<(), GuardError> {
    if values.len() != width {
        return Err(GuardError::value(format!("a direction of {width} values"), values.len()));
    }
    if let Some(value) = values.iter().find(|value| !value.is_finite()) {
        return Err(GuardError::value("a direction of finite values", value));
    }
    let length = norm(values);
    if length > 0.0 && length.is_finite() { Ok(()) } else { Err(GuardError::value("a direction above zero", length)) }
}

fn check_probe(probe: &Probe, vectors: &[GuardVector]) -> Result<(), Problem> {
    let at = |key: &str| format!("target.probe.{key}");
    if probe.prompt.is_empty() {
        return Err(GuardError::value("a prompt", "an empty one")).at(at("prompt"));
    }
    let vector = &vectors[find_vector(vectors, &probe.vector).at(at("vector"))?];
    if vector.layer != probe.layer {
        let expected = format!("{}, where vector `{}` is in the target", vector.layer, vector.name);
        return Err(GuardError::value(expected, probe.layer)).at(at("layer"));
    }
    check_positive(probe.mean_norm).at(at("mean_norm"))?;
    check_finite(probe.projection).at(at("projection"))?;
    if !(probe.spread.is_finite() && probe.spread >= 0.0) {
        return Err(GuardError::value("a finite number, 0 or more", probe.spread)).at(at("spread"));
    }
    // A tolerance above 1 would let a residual of zeros pass.
    if !(probe.tolerance > 0.0 && probe.tolerance < 1.0) {
        return Err(GuardError::value("a fraction above 0 and below 1", probe.tolerance)).at(at("tolerance"));
    }
    Ok(())
}

fn check_finite(value: f64) -> Result<(), GuardError> {
    if value.is_finite() { Ok(()) } else { Err(GuardError::value("a finite number", value)) }
}

pub(super) fn finite_f32(value: f64) -> Result<(), GuardError> {
    let fits = (value as f32).is_finite();
    if fits { Ok(()) } else { Err(GuardError::value("a finite number that fits in `f32`", value)) }
}

fn check_positive(value: f64) -> Result<(), GuardError> {
    let fits = value.is_finite() && value > 0.0;
    if fits { Ok(()) } else { Err(GuardError::value("a finite number above 0", value)) }
}

fn check_guard_name(name: &str) -> Result<(), GuardError> {
    let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    if name.is_empty() || name.len() > MAX_NAME || !name.bytes().all(fits) {
        let expected = format!("1 to {MAX_NAME} of the characters `a-z`, `0-9` and `-`");
        return Err(GuardError::value(expected, format!("`{name}`")));
    }
    Ok(())
}

/// A name that can be written on a command line and before an equals sign.
pub(super) fn check_name(name: &str) -> Result<(), GuardError> {
    if name.is_empty() || name.len() > MAX_NAME || !name.bytes().all(is_plain) {
        let expected = format!("1 to {MAX_NAME} letters, digits, `.`, `_` or `-`");
        return Err(GuardError::value(expected, format!("`{name}`")));
    }
    Ok(())
}

/// A bare file name: no separator of any system, no drive, nothing hidden, no step up.
pub(super) fn check_file_name(name: &str, ending: &str) -> Result<(), GuardError> {
    let long_enough = name.len() > ending.len() && name.len() <= 255;
    if !(long_enough && name.ends_with(ending) && name.bytes().all(is_plain) && !name.starts_with('.')) {
        let expected = format!("the bare name of a file in the guard's folder, ending in `{ending}`");
        return Err(GuardError::value(expected, format!("`{name}`")));
    }
    Ok(())
}

fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-')
}

/// Text for people: whatever prints it may trust that it moves no cursor.
fn check_text(text: &str) -> Result<(), GuardError> {
    match text.chars().find(|character| character.is_control() && !matches!(character, '\n' | '\t')) {
        Some(found) => Err(GuardError::value("text without control characters", found.escape_default())),
        None => Ok(()),
    }
}

/// Text of one line that is not empty.
fn check_label(text: &str) -> Result<(), GuardError> {
    check_text(text)?;
    if text.is_empty() || text.contains(['\n', '\t']) {
        return Err(GuardError::value("one line of text", format!("`{text}`")));
    }
    Ok(())
}
