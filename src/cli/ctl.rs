use super::Outcome;
use super::args::{CtlArguments, CtlCommand};
use super::table::table;
use anyhow::{Context, bail, ensure};
use pilotfish::attach::control::{
    Answer, Asked, Counts, GuardStatus, InForce, MAX_LINE_BYTES, ModelStatus, Outcome as Answered, Request, Score,
    Status, TextForm, VERSION,
};
use pilotfish::attach::{Fail, sockets};
use pilotfish::program::Setting;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long an answer is waited for: a score is a prompt of the app's model.
const PATIENCE: Duration = Duration::from_secs(300);

/// Asks an attached process.
pub fn ctl(arguments: &CtlArguments) -> anyhow::Result<Outcome> {
    let request = request(&arguments.command)?;
    let reloads = matches!(request, Request::Reload);
    let answered = ask(&socket(arguments)?, request)?;
    let mut out = std::io::stdout().lock();
    match answered {
        Answered::Error(problem) => bail!("{problem}"),
        Answered::Metrics(text) if arguments.json => {
            writeln!(out, "{}", serde_json::json!({ "metrics": text }))?;
        }
        Answered::Metrics(text) => out.write_all(text.as_bytes())?,
        Answered::Status(status) if arguments.json => writeln!(out, "{}", serde_json::to_string(&status)?)?,
        Answered::InForce(in_force) => {
            match arguments.json {
                true => writeln!(out, "{}", serde_json::to_string(&in_force)?)?,
                false => write_in_force(&mut out, &in_force)?,
            }
            let of_guards = in_force.guards.iter().filter_map(|guard| guard.problem.as_ref());
            let problems: Vec<&str> = in_force.problem.iter().chain(of_guards).map(String::as_str).collect();
            if reloads && !problems.is_empty() {
                bail!("not all was taken; what was read before stays in force: {}", problems.join("; "));
            }
        }
        Answered::Score(score) if arguments.json => writeln!(out, "{}", serde_json::to_string(&score)?)?,
        Answered::Status(status) => write_status(&mut out, &status)?,
        Answered::Score(score) => write_score(&mut out, &score)?,
    }
    Ok(Outcome::Done)
}

fn request(command: &CtlCommand) -> anyhow::Result<Request> {
    Ok(match command {
        CtlCommand::Status => Request::Status,
        CtlCommand::Reload => Request::Reload,
        CtlCommand::Metrics => Request::Metrics,
        CtlCommand::Toggle { guard, what } => {
            let mut enabled = None;
            let mut interventions = BTreeMap::new();
            for word in what {
                match (word.as_str(), word.rsplit_once('=')) {
                    ("on", _) => enabled = Some(true),
                    ("off", _) => enabled = Some(false),
                    (_, Some((name, "reset"))) => drop(interventions.insert(name.to_owned(), None)),
                    (_, Some((name, setting))) => {
                        let setting: Setting = setting.parse().map_err(anyhow::Error::msg)?;
                        interventions.insert(name.to_owned(), Some(setting));
                    }
                    _ => bail!(
                        "`{word}` is no change: give `on`, `off`, or `INTERVENTION=` and `on`, `off`, a strength or `reset`"
                    ),
                }
            }
            Request::Toggle { guard: guard.clone(), enabled, interventions }
        }
        CtlCommand::Score { text, model, chat, templated } => {
            let text = match text {
                Some(text) => text.clone(),
                None => std::io::read_to_string(std::io::stdin()).context("can't read the text from stdin")?,
            };
            let form = match (chat, templated) {
                (true, _) => TextForm::Chat,
                (_, true) => TextForm::Templated,
                _ => TextForm::Plain,
            };
            Request::Score { text, model: *model, form }
        }
    })
}

/// The socket that is named, or of the process that is, or of the only one there is.
fn socket(arguments: &CtlArguments) -> anyhow::Result<PathBuf> {
    if let Some(socket) = &arguments.socket {
        return Ok(socket.clone());
    }
    let user = rustix::process::geteuid().as_raw();
    let folder = sockets::folder(user);
    let none = || {
        format!(
            "no attached process has a socket in `{}`: it has one once its model has a context, if `pilotfish attach` was not told otherwise; name another by `--socket`",
            folder.display()
        )
    };
    match sockets::is_private(&folder, user) {
        Err(error) if error.kind() == ErrorKind::NotFound => bail!(none()),
        checked => {
            checked.with_context(|| format!("the folder of sockets, `{}`, can't be trusted", folder.display()))?
        }
    }
    sockets::remove_stale(&folder);
    let listed = sockets::listed(&folder).with_context(|| format!("can't read `{}`", folder.display()))?;
    if let Some(wanted) = arguments.pid {
        let found = listed.iter().find(|(pid, _)| *pid == wanted);
        let own = |(pid, _): &(u32, PathBuf)| pid.to_string();
        return found.map(|(_, path)| path.clone()).with_context(|| match listed.as_slice() {
            [] => none(),
            others => format!(
                "process {wanted} is not attached; these are: {}",
                others.iter().map(own).collect::<Vec<_>>().join(", ")
            ),
        });
    }
    match listed.as_slice() {
        [] => bail!(none()),
        [(_, only)] => Ok(only.clone()),
        several => {
            let told: Vec<String> =
                several.iter().map(|(pid, path)| format!("\n  {pid}  {}", command_at(path))).collect();
            bail!("{} attached processes are there; choose one by `--pid`:{}", several.len(), told.concat())
        }
    }
}

/// The command line of the process that listens at `path`.
fn command_at(path: &Path) -> String {
    match ask(path, Request::Status) {
        Ok(Answered::Status(status)) => status.command.join(" "),
        Ok(_) => "it does not say what it runs".to_owned(),
        Err(error) => format!("{error:#}"),
    }
}

fn ask(path: &Path, request: Request) -> anyhow::Result<Answered> {
    let stream = UnixStream::connect(path).map_err(|error| {
        let shown = path.display();
        let why = match error.kind() {
            ErrorKind::NotFound => format!("there is no socket `{shown}`"),
            ErrorKind::PermissionDenied => {
                format!("the socket `{shown}` is another user's: ask as the user that the process runs as")
            }
            ErrorKind::ConnectionRefused => format!("nobody listens at `{shown}`: its process has ended"),
            _ => format!("can't reach `{shown}`"),
        };
        anyhow::Error::new(error).context(why)
    })?;
    let said = || format!("the process at `{}` does not answer", path.display());
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let line = serde_json::to_string(&Asked { version: VERSION, request })?;
    ensure!(
        (line.len() as u64) < MAX_LINE_BYTES,
        "the request is longer than {MAX_LINE_BYTES} bytes: score a shorter text"
    );
    // One that is busy says so without reading.
    let sent = writeln!(&stream, "{line}");
    let mut answer = String::new();
    BufReader::new(&stream).take(MAX_LINE_BYTES).read_line(&mut answer).with_context(said)?;
    if answer.is_empty() {
        sent.with_context(said)?;
        bail!("{}: it hung up", said());
    }
    let value: serde_json::Value = serde_json::from_str(&answer).with_context(said)?;
    let version = value.get("version").and_then(serde_json::Value::as_u64);
    ensure!(
        version == Some(u64::from(VERSION)),
        "the process at `{}` has a library of another version than this `pilotfish`, {}: use the `pilotfish` that it was attached by, or start it anew",
        path.display(),
        env!("CARGO_PKG_VERSION")
    );
    let Answer { answer, .. } = serde_json::from_value(value)
        .with_context(|| format!("the process at `{}` answers what can't be read", path.display()))?;
    Ok(answer)
}

fn write_status(out: &mut impl Write, status: &Status) -> anyhow::Result<()> {
    let fail = match status.fail {
        Fail::Closed => "closed",
        Fail::Open => "open",
    };
    writeln!(out, "process {}: {}", status.pid, status.command.join(" "))?;
    writeln!(out, "library {}, fails {fail}; contexts that have decoded: {}", status.library, status.contexts)?;
    if let Some(audit) = &status.audit {
        let problem = audit.problem.as_ref().map(|problem| format!(": {problem}")).unwrap_or_default();
        writeln!(out, "audit log `{}`{problem}", audit.path)?;
    }
    if let Some(problem) = &status.problem {
        writeln!(out, "nothing decodes: {problem}")?;
    }
    let Counts { decodes, prompt_tokens, answer_tokens, prompts, blocked, faults, refused, unguarded } = status.counts;
    writeln!(
        out,
        "{decodes} decodes guarded, {refused} refused, {unguarded} unguarded; {prompts} prompts of {prompt_tokens} tokens, {answer_tokens} of answers; {blocked} blocked, {faults} faults"
    )?;
    write_in_force(out, &status.in_force)
}

fn write_in_force(out: &mut impl Write, in_force: &InForce) -> anyhow::Result<()> {
    writeln!(out, "epoch {}, guards of `{}`", in_force.epoch, in_force.directory)?;
    if let Some(problem) = &in_force.problem {
        writeln!(out, "{problem}")?;
    }
    let guard = |guard: &GuardStatus| {
        let gates: Vec<String> = guard.gates.iter().map(|gate| format!("{} ({})", gate.name, gate.on_fire)).collect();
        let intervention = |intervention: &pilotfish::attach::control::InterventionStatus| {
            let own = intervention.strength_of_guard;
            let rest = if intervention.strength == own { String::new() } else { format!(" (guard: {own})") };
            format!("{} {}{rest}", intervention.name, intervention.strength)
        };
        let interventions: Vec<String> = guard.interventions.iter().map(intervention).collect();
        [
            guard.name.clone().unwrap_or_default(),
            guard.folder.clone(),
            if guard.enabled { "on" } else { "off" }.to_owned(),
            gates.join("\n"),
            interventions.join("\n"),
            guard.problem.clone().unwrap_or_default(),
        ]
    };
    let header = ["guard", "folder", "", "gates", "interventions", "problem"];
    writeln!(out, "{}", table(header, in_force.guards.iter().map(guard)))?;
    if in_force.models.is_empty() {
        writeln!(out, "no model has decoded yet")?;
        return Ok(());
    }
    let model = |(number, model): (usize, &ModelStatus)| {
        let guards = if model.guards.is_empty() { "no guard".to_owned() } else { model.guards.join(", ") };
        [
            number.to_string(),
            model.name.clone(),
            model.architecture.clone(),
            model.fingerprint.chars().take(12).collect(),
            model.quantization.clone(),
            model.problem.clone().unwrap_or(guards),
        ]
    };
    let header = ["model", "name", "architecture", "fingerprint", "quantization", "guarded by"];
    writeln!(out, "{}", table(header, in_force.models.iter().enumerate().map(model)))?;
    Ok(())
}

fn write_score(out: &mut impl Write, score: &Score) -> anyhow::Result<()> {
    let rows = score.gates.iter().map(|gate| {
        let shown = gate.score.map_or_else(|| "-".to_owned(), |score| format!("{score:.3}"));
        [gate.guard.clone(), gate.gate.clone(), shown, if gate.fired { "fired" } else { "" }.to_owned()]
    });
    writeln!(out, "{}", table(["guard", "gate", "score", ""], rows))?;
    writeln!(out, "{} tokens on `{}`, epoch {}", score.tokens, score.model, score.epoch)?;
    Ok(())
}
