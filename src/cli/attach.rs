use super::Outcome;
use super::args::AttachArguments;
use anyhow::{Context, bail, ensure};
use memchr::memmem;
use pilotfish::attach::{self, Control, Fail, Policy};
use pilotfish::guard::MANIFEST_FILE;
use rustix::fs::Access;
use std::env;
use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The library's file, as cargo names it.
const LIBRARY: &str = "libpilotfish_attach.so";
/// Names the library, where it is not beside the command.
const LIBRARY_VARIABLE: &str = "PILOTFISH_ATTACH_LIBRARY";

/// Becomes COMMAND with the library in it.
pub fn attach(arguments: &AttachArguments) -> anyhow::Result<Outcome> {
    ensure!(
        cfg!(target_os = "linux"),
        "`attach` works on Linux only; link a guard into the app, or use `pilotfish serve`"
    );
    let guards = &arguments.guards;
    let guards =
        guards.canonicalize().with_context(|| format!("can't find the guards' directory `{}`", guards.display()))?;
    ensure!(guards.is_dir(), "`{}` is no directory: give the one that has a folder for each guard", guards.display());
    ensure!(
        !guards.join(MANIFEST_FILE).exists(),
        "`{}` is a guard's own folder: give the directory that it lies in",
        guards.display()
    );
    let library = library(arguments.library.as_deref())?;
    let content = std::fs::read(&library).with_context(|| format!("can't read `{}`", library.display()))?;
    ensure!(
        memmem::find(&content, OWN_FUNCTION).is_some(),
        "`{}` is not the library of pilotfish: it has no function `{}`",
        library.display(),
        String::from_utf8_lossy(OWN_FUNCTION)
    );
    let (program, rest) = arguments.command.split_first().context("no command is given")?;
    let executable = which::which(program)
        .with_context(|| format!("there is no command `{}` that can be run", program.display()))?;
    check(&executable)?;
    // The app may run in another folder.
    let absolute = |path: &PathBuf| std::path::absolute(path).with_context(|| format!("`{}`", path.display()));
    let of_environment = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let audit = arguments.audit.clone().or_else(|| of_environment(attach::AUDIT));
    let control = match arguments.control.clone().or_else(|| of_environment(attach::CONTROL)) {
        _ if arguments.no_control => Control::Off,
        Some(path) => Control::named(path),
        None => Control::Found,
    };
    let control = match control {
        Control::At(path) => Control::At(absolute(&path)?),
        other => other,
    };
    let audit = audit.as_ref().map(absolute).transpose()?;
    let policy = Policy { guards, fail: arguments.fail.into(), audit, control };
    if let (Some(audit), Fail::Closed) = (&policy.audit, policy.fail) {
        check_audit(audit)?;
    }
    let mut command = Command::new(&executable);
    command.arg0(program).args(rest).envs(policy.to_environment()).env("LD_PRELOAD", preload(&library)?);
    // Only comes back where it fails.
    let error = command.exec();
    Err(error).with_context(|| format!("can't run `{}`", executable.display()))
}

/// Sees that an audit log can be written at `path`, as far as that can be told without touching it: where none can, every decode would fail.
fn check_audit(path: &Path) -> anyhow::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    let checked = if folder.to_string_lossy().contains(attach::PID) {
        Ok(())
    } else if path.exists() {
        OpenOptions::new().append(true).open(path).map(drop)
    } else {
        rustix::fs::access(folder, Access::WRITE_OK | Access::EXEC_OK).map_err(Into::into)
    };
    checked.with_context(|| format!("the audit log `{}` can't be written", path.display()))
}

/// The library: the one that is given, or that the environment names, or one beside the command or in the `lib` beside its folder.
fn library(given: Option<&Path>) -> anyhow::Result<PathBuf> {
    let named = given.map(Path::to_owned).or_else(|| env::var_os(LIBRARY_VARIABLE).map(PathBuf::from));
    if let Some(named) = named {
        return named.canonicalize().with_context(|| format!("can't find the library `{}`", named.display()));
    }
    let own = env::current_exe().and_then(|path| path.canonicalize()).context("can't tell where `pilotfish` lies")?;
    let folder = own.parent().unwrap_or(Path::new("/"));
    let places = [folder.join(LIBRARY), folder.join("../lib").join(LIBRARY)];
    let found = places.iter().find_map(|place| place.canonicalize().ok());
    found.with_context(|| {
        let places = places.map(|place| format!("`{}`", place.display())).join(" or ");
        format!("the library is not at {places}: build it with `make attach`, or name it by `--library` or {LIBRARY_VARIABLE}")
    })
}

/// What is preloaded: the library, and then what was to be already.
fn preload(library: &Path) -> anyhow::Result<OsString> {
    let mut preload = library.as_os_str().to_owned();
    if preload.as_bytes().iter().any(|byte| byte.is_ascii_whitespace() || *byte == b':') {
        bail!("the dynamic linker takes no path with a space or a colon: `{}`", library.display());
    }
    if let Some(before) = env::var_os("LD_PRELOAD").filter(|before| !before.is_empty()) {
        preload.push(":");
        preload.push(before);
    }
    Ok(preload)
}

/// Where the dynamic linker would take no notice of what is preloaded, says so: the app would run without a guard.
fn check(executable: &Path) -> anyhow::Result<()> {
    let mut file = std::fs::File::open(executable).with_context(|| format!("can't read `{}`", executable.display()))?;
    let metadata = file.metadata()?;
    let is_other = |bit: u32, owner: u32, own: u32| metadata.mode() & bit != 0 && owner != own;
    let (user, group) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    if is_other(0o4000, metadata.uid(), user) || is_other(0o2000, metadata.gid(), group) {
        bail!("`{}` runs as another user or group, where the system preloads nothing", executable.display());
    }
    let mut head = Vec::new();
    file.by_ref().take(1 << 16).read_to_end(&mut head)?;
    if is_static(&head) {
        bail!(
            "`{}` is linked statically, so nothing can be preloaded into it: run its model with `pilotfish serve`, or link a guard into it",
            executable.display()
        );
    }
    let mut rest = Vec::new();
    file.read_to_end(&mut rest)?;
    if [head, rest].iter().any(|part| memmem::find(part, LINKED_IN).is_some()) {
        bail!(
            "`{}` has llama.cpp linked into it, where nothing can be put between: run its model with `pilotfish serve`, or link a guard into it",
            executable.display()
        );
    }
    Ok(())
}

/// By which the library is known.
const OWN_FUNCTION: &[u8] = b"pilotfish_abi_version";

/// What llama.cpp says when it loads a model, and apps that load it as a library do not.
const LINKED_IN: &[u8] = b"llama_model_loader: ";

/// Whether `head` begins an ELF executable that asks for no dynamic linker. A script or anything else is left to the system.
fn is_static(head: &[u8]) -> bool {
    use object::elf::{FileHeader64, PT_INTERP};
    use object::read::elf::{FileHeader, ProgramHeader};
    let Ok(header) = FileHeader64::<object::Endianness>::parse(head) else { return false };
    let Ok(endian) = header.endian() else { return false };
    let Ok(parts) = header.program_headers(endian, head) else { return false };
    !parts.is_empty() && parts.iter().all(|part| part.p_type(endian) != PT_INTERP)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_dynamic_linker_is_static() {
        let own = std::fs::read(env::current_exe().unwrap()).unwrap();
        assert!(!is_static(&own[..1 << 16]));
        assert!(!is_static(b"#!/bin/sh\n"));
        // The same with every kind of part changed to one that says nothing.
        let mut changed = own[..1 << 16].to_vec();
        let (at, size, n) = (
            u64::from_le_bytes(changed[32..40].try_into().unwrap()) as usize,
            u16::from_le_bytes(changed[54..56].try_into().unwrap()) as usize,
            u16::from_le_bytes(changed[56..58].try_into().unwrap()) as usize,
        );
        for part in 0..n {
            changed[at + part * size..][..4].fill(0);
        }
        assert!(is_static(&changed));
    }
}
