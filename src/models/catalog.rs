use super::descriptor::Descriptor;
use super::error::ModelError;
use etcetera::BaseStrategy;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The descriptors that come with the program, by file name.
const SHIPPED: [(&str, &str); 2] = [
    ("models/gemma-3-270m.toml", include_str!("../../models/gemma-3-270m.toml")),
    ("models/smollm2-135m-instruct.toml", include_str!("../../models/smollm2-135m-instruct.toml")),
];

/// Every descriptor known here: the shipped ones and the user's own, by name.
#[derive(Debug, Clone)]
pub struct Catalog {
    by_name: BTreeMap<String, Descriptor>,
}

impl Catalog {
    /// The shipped descriptors and every `NAME.toml` in the directory `PILOTFISH_DESCRIPTORS`, or where that is not set
    /// in `pilotfish/models` of the user's configuration. The user's own replaces a shipped one of the same name.
    pub fn load() -> Result<Self, ModelError> {
        match std::env::var_os("PILOTFISH_DESCRIPTORS") {
            Some(directory) => Self::with_directory(Path::new(&directory)),
            None => {
                match etcetera::choose_base_strategy().map(|base| base.config_dir().join("pilotfish").join("models")) {
                    Ok(directory) if directory.is_dir() => Self::with_directory(&directory),
                    _ => Self::shipped(),
                }
            }
        }
    }

    /// The descriptor of that name.
    pub fn find(&self, name: &str) -> Option<&Descriptor> {
        self.by_name.get(name)
    }

    /// All of them, in order of name.
    pub fn iter(&self) -> impl Iterator<Item = &Descriptor> {
        self.by_name.values()
    }

    fn shipped() -> Result<Self, ModelError> {
        let mut catalog = Self { by_name: BTreeMap::new() };
        for (file, text) in SHIPPED {
            catalog.add(Descriptor::parse(file, text)?);
        }
        Ok(catalog)
    }

    fn with_directory(directory: &Path) -> Result<Self, ModelError> {
        let mut catalog = Self::shipped()?;
        for path in descriptor_files(directory)? {
            let text = fs::read_to_string(&path).map_err(ModelError::io("read", &path))?;
            let file = path.display().to_string();
            let descriptor = Descriptor::parse(&file, &text)?;
            if path.file_stem().is_none_or(|stem| stem != descriptor.name.as_str()) {
                let message = format!("its `name` is `{}`, so the file must be `{0}.toml`", descriptor.name);
                return Err(ModelError::Descriptor { file, line: None, message });
            }
            catalog.add(descriptor);
        }
        Ok(catalog)
    }

    fn add(&mut self, descriptor: Descriptor) {
        self.by_name.insert(descriptor.name.clone(), descriptor);
    }
}

fn descriptor_files(directory: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).map_err(ModelError::io("list", directory))? {
        let path = entry.map_err(ModelError::io("list", directory))?.path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_descriptors_are_sound_and_named_after_their_files() {
        let catalog = Catalog::shipped().unwrap();
        let names: Vec<_> = catalog.iter().map(|descriptor| descriptor.name.as_str()).collect();
        assert_eq!(names, ["gemma-3-270m", "smollm2-135m-instruct"]);
        for ((file, _), name) in SHIPPED.iter().zip(names) {
            assert_eq!(*file, format!("models/{name}.toml"));
        }
        assert!(catalog.iter().all(|descriptor| !descriptor.sources.is_empty()));
    }

    #[test]
    fn the_users_own_descriptors_are_added_and_replace_shipped_ones() {
        let directory = tempfile::tempdir().unwrap();
        let (_, gemma) = SHIPPED[0];
        let own = gemma.replace("name = \"gemma-3-270m\"", "name = \"mine\"");
        fs::write(directory.path().join("mine.toml"), own).unwrap();
        let replaced = gemma.replace("Q4_K_M", "Q4_K_M again");
        fs::write(directory.path().join("gemma-3-270m.toml"), replaced).unwrap();
        fs::write(directory.path().join("notes.txt"), "not a descriptor").unwrap();

        let catalog = Catalog::with_directory(directory.path()).unwrap();
        assert_eq!(catalog.iter().count(), 3);
        assert_eq!(catalog.find("mine").unwrap().n_embd, 640);
        assert_eq!(catalog.find("gemma-3-270m").unwrap().quantization, "Q4_K_M again");
        assert!(catalog.find("other").is_none());
    }

    #[test]
    fn a_file_named_otherwise_than_its_model_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("other.toml"), SHIPPED[0].1).unwrap();
        let error = Catalog::with_directory(directory.path()).unwrap_err().to_string();
        assert!(error.contains("other.toml") && error.contains("`gemma-3-270m.toml`"), "{error}");
    }
}
