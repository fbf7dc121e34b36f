use super::Outcome;
use super::args::{AuditArguments, LoadArguments, ServeArguments};
use super::models::load_named;
use anyhow::{Context, ensure};
use config::{Config, Environment, File, FileFormat};
use pilotfish::audit::{Verified, verify};
use pilotfish::server::{self, ServerConfig};
use std::io::Write;

pub fn serve(arguments: &ServeArguments) -> anyhow::Result<Outcome> {
    let config = configuration(arguments)?;
    if arguments.print_config {
        std::io::stdout().lock().write_all(toml::to_string_pretty(&config)?.as_bytes())?;
        return Ok(Outcome::Done);
    }
    ensure!(!config.model.is_empty(), "no model is given: use `--model`, or `model` in the configuration");
    let load = LoadArguments { gpu_layers: config.gpu_layers, raw: false };
    let model = load_named(&config.model, &arguments.lora, &load)?;
    server::serve(config, model, |serving| {
        let guards = if serving.guards.is_empty() { "no guard".to_owned() } else { serving.guards.join(", ") };
        let scheme = if serving.tls { "https" } else { "http" };
        eprintln!("listening on {scheme}://{} under {guards}", serving.address);
    })?;
    Ok(Outcome::Done)
}

/// The file, the environment over it, the command line over both.
fn configuration(arguments: &ServeArguments) -> anyhow::Result<ServerConfig> {
    let mut layers = Config::builder();
    if let Some(path) = &arguments.config {
        let text = std::fs::read_to_string(path).with_context(|| format!("can't read `{}`", path.display()))?;
        // By itself first, so that what is wrong is told with its line.
        toml::from_str::<ServerConfig>(&text).with_context(|| format!("`{}`", path.display()))?;
        layers = layers.add_source(File::from_str(&text, FileFormat::Toml));
    }
    let environment = Environment::with_prefix("PILOTFISH_SERVE").prefix_separator("__").separator("__");
    layers = layers.add_source(environment.try_parsing(true).ignore_empty(true));
    let path = |path: &Option<std::path::PathBuf>| path.as_ref().map(|path| path.to_string_lossy().into_owned());
    let layers = layers
        .set_override_option("model", arguments.model.clone())?
        .set_override_option("guards", path(&arguments.guards))?
        .set_override_option("listen", arguments.listen.map(|address| address.to_string()))?
        .set_override_option("keys", path(&arguments.keys))?
        .set_override_option("limits.parallel", arguments.parallel)?
        .set_override_option("limits.context", arguments.context)?
        .set_override_option("gpu_layers", arguments.gpu_layers)?
        .set_override_option("audit.path", path(&arguments.audit))?;
    layers.build()?.try_deserialize().context("the configuration")
}

pub fn audit(arguments: &AuditArguments) -> anyhow::Result<Outcome> {
    let found = verify(&arguments.log)?;
    let mut out = std::io::stdout().lock();
    if arguments.json {
        let line = serde_json::json!({
            "records": found.records,
            "first": found.first_seq,
            "last": found.last_seq,
            "last_hash": found.last_hash.to_string(),
            "files": found.files,
        });
        writeln!(out, "{line}")?;
    } else {
        let Verified { records, first_seq, last_seq, last_hash, files } = found;
        writeln!(out, "{records} records in {files} files are whole: {first_seq} to {last_seq}, hash {last_hash}")?;
    }
    Ok(Outcome::Done)
}
