use super::error::{GuardError, shown};
use super::folder::{Files, Folder, MappingFiles};
use super::manifest::{InterventionEntry, InterventionName, Manifest, VectorEntry};
use super::tensors::{self, TensorData, TensorFile};
use super::validate::{self, check_file_name};
use super::{AdapterIdentity, Digest, Guard, MANIFEST_FILE, MAPPING_SUFFIX, ModelIdentity};
use crate::steering::{ControlVector, ExtractionMethod, VectorKind};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

/// Writes a guard's folder and reads it back: the tensor file, mapping files to carry in it (`NAME.map.safetensors` and bytes), and the
/// manifest with the tensor file's sha256 filled in. A mapping's own sha256 is its [`Digest`]; one that is not carried has to be among
/// the shared mappings.
///
/// The guard is validated before anything is written, each file replaces its forerunner in one step, and the manifest comes last: a
/// reader meets the old guard, the new one, or for a moment one that does not verify.
///
/// # Errors
/// A guard that does not validate, or a folder that can't be written.
pub fn write_guard(
    directory: &Path,
    manifest: &Manifest,
    tensors: &[(String, Vec<f32>)],
    mappings: &[(String, Vec<u8>)],
) -> Result<Guard, GuardError> {
    let tensors = tensor_bytes(tensors)?;
    let mut manifest = manifest.clone();
    manifest.tensors.sha256 = Digest::of(&tensors);
    let text = manifest.to_toml()?;

    let folder = Folder::new(directory);
    let planned = Planned { folder: &folder, tensors: &tensors, mappings };
    validate::guard(&folder.label(MANIFEST_FILE), text.as_bytes(), &planned)?;
    for (name, _) in mappings {
        check_file_name(name, MAPPING_SUFFIX)?;
    }

    fs::create_dir_all(directory).map_err(GuardError::io("create", directory))?;
    for (name, bytes) in mappings {
        replace(directory, name, bytes)?;
    }
    replace(directory, &manifest.tensors.file, &tensors)?;
    replace(directory, MANIFEST_FILE, text.as_bytes())?;
    Guard::load(directory)
}

/// A guard of vectors that need no mapping, with no folder: the tensors that `manifest` names, and it with their sha256 filled in.
///
/// # Errors
/// A guard that does not validate.
pub fn compose_guard(manifest: &Manifest, tensors: &[(String, Vec<f32>)]) -> Result<Guard, GuardError> {
    let tensors = tensor_bytes(tensors)?;
    let mut manifest = manifest.clone();
    manifest.tensors.sha256 = Digest::of(&tensors);
    Guard::from_parts(MANIFEST_FILE, manifest.to_toml()?.as_bytes(), &tensors, &[])
}

/// Writes a guard to `directory` that does what the guard in `onto` does and then what `addition` says, with the tensors and mapping files of both
/// (see [`write_guard`]). Name, and description and message where there are any, are the addition's; the probe and what a fault means are those of
/// `onto`. Measured results are of neither.
///
/// # Errors
/// A guard in `onto` that can't be read, guards for two models, vectors learnt on two models, two things of one name, or what [`write_guard`] refuses.
pub fn extend_guard(
    onto: &Path,
    directory: &Path,
    addition: Manifest,
    tensors: &[(String, Vec<f32>)],
    mappings: &[(String, Vec<u8>)],
) -> Result<Guard, GuardError> {
    let folder = Folder::new(onto);
    let label = folder.label(MANIFEST_FILE);
    let bytes = folder.manifest()?;
    validate::guard(&label, &bytes, &folder)?;
    let mut manifest = Manifest::parse(&label, &bytes)?;
    if manifest.target.fingerprint != addition.target.fingerprint {
        let (expected, found) = (addition.target.fingerprint, manifest.target.fingerprint);
        return Err(GuardError::value(format!("a guard for the model {expected} in `{label}`"), found.to_string()));
    }
    if !AdapterIdentity::alike(&manifest.target.adapters, &addition.target.adapters) {
        let [expected, found] =
            [&addition, &manifest].map(|manifest| AdapterIdentity::listed(&manifest.target.adapters));
        return Err(GuardError::value(format!("a guard for the model {expected} in `{label}`"), found));
    }
    // A guard names one source, and what it names has to be true of every vector that came through a mapping.
    if let (Some(first), Some(second)) = (&manifest.source, &addition.source)
        && first.fingerprint != second.fingerprint
    {
        let expected = format!("vectors learnt on {}, as those of `{label}` are", shown(&first.model));
        return Err(GuardError::value(expected, format!("some learnt on {}", second.model)));
    }
    let (mut all_tensors, mut all_mappings) = (Vec::new(), Vec::new());
    let file = folder.tensors(&manifest.tensors.file)?;
    let parsed = TensorFile::parse(&folder.label(&manifest.tensors.file), &file)?;
    for name in parsed.names() {
        let values = parsed.direction(&name)?;
        all_tensors.push((name, values));
    }
    let wanted = manifest.mappings.iter().map(|mapping| mapping.sha256).collect();
    let found = folder.mappings(&wanted)?;
    for mapping in &manifest.mappings {
        if let Some((_, bytes)) = found.get(&mapping.sha256) {
            all_mappings.push((format!("{}{MAPPING_SUFFIX}", mapping.name), bytes.to_vec()));
        }
    }
    all_tensors.extend_from_slice(tensors);
    for (name, bytes) in mappings {
        match all_mappings.iter().find(|(known, _)| known == name) {
            Some((_, known)) if known == bytes => {}
            Some(_) => return Err(GuardError::Duplicate { what: "mapping", name: name.clone() }),
            None => all_mappings.push((name.clone(), bytes.clone())),
        }
    }
    let Manifest { name, description, message, source, vectors, mappings, gates, interventions, .. } = addition;
    manifest.name = name;
    if !description.is_empty() {
        manifest.description = description;
    }
    manifest.message = message.or(manifest.message);
    manifest.source = manifest.source.or(source);
    manifest.vectors.extend(vectors);
    for mapping in mappings {
        if !manifest.mappings.contains(&mapping) {
            manifest.mappings.push(mapping);
        }
    }
    manifest.gates.extend(gates);
    manifest.interventions.extend(interventions);
    manifest.results.clear();
    write_guard(directory, &manifest, &all_tensors, &all_mappings)
}

/// The guard in `directory` as it would be with `text` for its manifest. Nothing is written.
///
/// # Errors
/// A guard that does not validate.
pub fn guard_with_manifest(directory: &Path, text: &str) -> Result<Guard, GuardError> {
    let folder = Folder::new(directory);
    validate::guard(&folder.label(MANIFEST_FILE), text.as_bytes(), &folder)
}

/// Replaces the manifest of the guard in `directory` by `text` (see [`edit`](super::edit)), if the guard is valid with it.
///
/// # Errors
/// A guard that does not validate, which leaves the old manifest, or a folder that can't be written.
pub fn replace_manifest(directory: &Path, text: &str) -> Result<Guard, GuardError> {
    guard_with_manifest(directory, text)?;
    replace(directory, MANIFEST_FILE, text.as_bytes())?;
    Guard::load(directory)
}

/// A guard that does what llama.cpp does with this control vector at this strength: for every direction an `add`, named and placed as
/// the direction is, at all positions with the first, which llama.cpp does not leave out.
///
/// Manifest and tensors are for [`write_guard`].
pub fn from_control_vector(
    name: &str,
    vector: &ControlVector,
    target: &ModelIdentity,
    strength: f64,
) -> (Manifest, Vec<(String, Vec<f32>)>) {
    let mut vectors = Vec::new();
    let mut interventions = Vec::new();
    let mut tensors = Vec::new();
    for (&layer, values) in vector.directions() {
        let name = format!("direction.{layer}");
        vectors.push(VectorEntry {
            name: name.clone(),
            layer: layer.into(),
            tensor: name.clone(),
            kind: VectorKind::Direction,
            mapping: None,
            method: Some(ExtractionMethod::Imported.to_string()),
            mean_norm: None,
        });
        let mut add = InterventionEntry::new(InterventionName::Add, name.clone());
        add.strength = strength;
        add.first_position = true;
        interventions.push(add);
        tensors.push((name, values.clone()));
    }
    let made_for = match vector.model_hint() {
        "" => String::new(),
        hint => format!(" made for `{}`", shown(hint)),
    };
    let description = format!("A llama.cpp control vector{made_for}, imported for {}", shown(&target.name));
    let manifest = Manifest { description, vectors, interventions, ..Manifest::new(name, target) };
    (manifest, tensors)
}

/// A tensor file of vectors, without metadata.
pub(super) fn tensor_bytes(vectors: &[(String, Vec<f32>)]) -> Result<Vec<u8>, GuardError> {
    let mut tensors = BTreeMap::new();
    for (name, values) in vectors {
        validate::check_name(name)?;
        let data = TensorData { shape: vec![values.len()], values };
        if tensors.insert(name.clone(), data).is_some() {
            return Err(GuardError::Duplicate { what: "tensor", name: name.clone() });
        }
    }
    Ok(tensors::to_bytes(&BTreeMap::new(), &tensors))
}

/// A folder as it will be.
struct Planned<'a> {
    folder: &'a Folder,
    tensors: &'a [u8],
    mappings: &'a [(String, Vec<u8>)],
}

impl Files for Planned<'_> {
    fn tensors(&self, _name: &str) -> Result<Cow<'_, [u8]>, GuardError> {
        Ok(Cow::Borrowed(self.tensors))
    }

    fn mappings(&self, wanted: &BTreeSet<Digest>) -> Result<MappingFiles<'_>, GuardError> {
        let carried = self
            .mappings
            .iter()
            .map(|(name, bytes)| (Digest::of(bytes), (self.folder.label(name), Cow::Borrowed(bytes.as_slice()))));
        let mut found: BTreeMap<_, _> = carried.filter(|(digest, _)| wanted.contains(digest)).collect();
        let left = wanted.iter().filter(|digest| !found.contains_key(digest)).copied().collect();
        found.extend(self.folder.mappings(&left)?);
        Ok(found)
    }

    fn searched(&self) -> String {
        self.folder.searched()
    }
}

/// Writes beside the file and renames, so that nobody sees half of it.
fn replace(directory: &Path, name: &str, bytes: &[u8]) -> Result<(), GuardError> {
    let path = directory.join(name);
    let beside = directory.join(format!(".{name}.{}.tmp", std::process::id()));
    let written = File::create(&beside).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    written.and_then(|()| fs::rename(&beside, &path)).map_err(|error| {
        // What is left of it helps nobody; that it may not go either adds nothing to the error.
        let _ = fs::remove_file(&beside);
        GuardError::io("write", &path)(error)
    })
}
