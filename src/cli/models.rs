use super::Outcome;
use super::args::{LoadArguments, LoraArgument, ModelArguments, ModelsCommand};
use super::progress::Bar;
use super::synthesize::synthesize;
use super::table::table;
use anyhow::{Context, bail};
use indicatif::HumanBytes;
use pilotfish::engine::{Adapter, Model, ModelOptions};
use pilotfish::models::{Catalog, Descriptor, ModelCache, PullProgress, pull};
use std::cell::RefCell;
use std::io::Write;
use std::path::{Path, PathBuf};

pub fn models(command: ModelsCommand) -> anyhow::Result<Outcome> {
    let catalog = Catalog::load()?;
    let cache = ModelCache::from_env()?;
    let mut out = std::io::stdout().lock();
    match command {
        ModelsCommand::Synthesize(arguments) => return synthesize(arguments),
        ModelsCommand::List => {
            let rows = catalog.iter().map(|descriptor| {
                [
                    descriptor.name.clone(),
                    descriptor.quantization.clone(),
                    HumanBytes(descriptor.bytes).to_string(),
                    descriptor.licence.clone(),
                    if cache.locate(descriptor).is_some() { "yes".into() } else { "no".into() },
                ]
            });
            writeln!(out, "{}", table(["name", "quantization", "size", "licence", "pulled"], rows))?;
        }
        ModelsCommand::Pull { name } => {
            let path = fetch(find(&catalog, &name)?, &cache)?;
            writeln!(out, "{}", path.display())?;
        }
        ModelsCommand::Path { name } => {
            let descriptor = find(&catalog, &name)?;
            let path = cache.locate(descriptor).with_context(|| not_pulled(&name))?;
            writeln!(out, "{}", path.display())?;
        }
    }
    Ok(Outcome::Done)
}

/// Brings a model into the cache, showing how far it is, and says where it is.
fn fetch(descriptor: &Descriptor, cache: &ModelCache) -> anyhow::Result<PathBuf> {
    let path = pull(descriptor, cache, &Stages(RefCell::default()))?;
    eprintln!("{}: verified (sha256 {}), at {}", descriptor.name, descriptor.sha256, path.display());
    Ok(path)
}

/// One bar a stage of a pull.
struct Stages(RefCell<Option<(String, Bar)>>);

impl PullProgress for Stages {
    fn report(&self, stage: &str, done: u64, total: u64) {
        let mut current = self.0.borrow_mut();
        if current.as_ref().is_none_or(|(name, _)| name != stage) {
            *current = Some((stage.to_owned(), Bar::bytes(stage)));
        }
        if let Some((_, bar)) = current.as_ref() {
            bar.at(done as usize, total as usize);
        }
    }
}

fn find<'a>(catalog: &'a Catalog, name: &str) -> anyhow::Result<&'a Descriptor> {
    catalog.find(name).with_context(|| {
        let known: Vec<_> = catalog.iter().map(|descriptor| descriptor.name.as_str()).collect();
        format!("no model is called `{name}`; known are {}", known.join(", "))
    })
}

fn not_pulled(name: &str) -> String {
    format!("`{name}` is not on this machine; run `pilotfish models pull {name}`")
}

pub fn load(arguments: &ModelArguments) -> anyhow::Result<Model> {
    load_named(&arguments.model, &arguments.lora, &arguments.load)
}

/// Loads `model`, a GGUF file or a descriptor's name, with its adapters.
pub fn load_named(model: &str, lora: &[LoraArgument], arguments: &LoadArguments) -> anyhow::Result<Model> {
    let catalog = Catalog::load()?;
    let path = Path::new(model);
    let (name, path, template) = match catalog.find(model) {
        Some(descriptor) => {
            let path = ModelCache::from_env()?.locate(descriptor).with_context(|| not_pulled(model))?;
            (model.to_owned(), path, descriptor.template.clone())
        }
        None if path.extension().is_some_and(|extension| extension == "gguf") || path.is_file() => {
            let name = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
            (name, path.to_owned(), None)
        }
        None => bail!("`{model}` is neither a GGUF file nor a known model; see `pilotfish models list`"),
    };
    let options = ModelOptions {
        gpu_layers: arguments.gpu_layers,
        fallback_template: template,
        raw: arguments.raw,
        adapters: lora.iter().map(|of| Adapter { path: of.path.clone(), scale: of.scale }).collect(),
    };
    Ok(Model::load(&path, &name, &options)?)
}
