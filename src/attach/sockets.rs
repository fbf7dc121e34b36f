//! Where attached processes listen: a folder of their user's own, in which each has a socket by its process's id.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

/// The folder of the user `user`: in `runtime` (`XDG_RUNTIME_DIR`), or else in the system's folder for what is temporary.
pub fn folder(user: u32) -> PathBuf {
    match std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|path| path.is_absolute()) {
        Some(runtime) => runtime.join("pilotfish"),
        None => std::env::temp_dir().join(format!("pilotfish-{user}")),
    }
}

/// Makes sure that `folder` is there, and that nobody but `user` reaches into it.
///
/// # Errors
/// It can't be made, or is somebody else's or open to others.
pub fn make_private(folder: &Path, user: u32) -> io::Result<()> {
    match fs::DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    is_private(folder, user)
}

/// # Errors
/// `folder` is not there, no folder, or somebody else's or open to others: what lies in it may be anybody's.
pub fn is_private(folder: &Path, user: u32) -> io::Result<()> {
    let metadata = fs::symlink_metadata(folder)?;
    let wrong = |what: &str| Err(io::Error::new(ErrorKind::PermissionDenied, what.to_owned()));
    if !metadata.is_dir() {
        return wrong("it is no folder");
    }
    if metadata.uid() != user {
        return wrong("it belongs to another user");
    }
    if metadata.mode() & 0o077 != 0 {
        return wrong("others may use it: its mode is to be 0700");
    }
    Ok(())
}

/// The socket of the process `pid`.
pub fn socket_of(folder: &Path, pid: u32) -> PathBuf {
    folder.join(format!("{pid}.sock"))
}

/// The processes that have a socket in `folder`, by their ids.
///
/// # Errors
/// The folder can't be read.
pub fn listed(folder: &Path) -> io::Result<Vec<(u32, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let pid = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".sock")?.parse().ok());
        found.extend(pid.map(|pid| (pid, path)));
    }
    found.sort();
    Ok(found)
}

/// Removes what processes left that did not come to a clean end: sockets that nobody listens at, of processes that are no more.
pub fn remove_stale(folder: &Path) {
    for (pid, path) in listed(folder).unwrap_or_default() {
        // One that has just been made may not be listened at yet.
        if !Path::new("/proc").join(pid.to_string()).exists() && is_silent(&path) {
            let _ = fs::remove_file(path);
        }
    }
}

/// Whether nobody listens at the socket `path`.
pub fn is_silent(path: &Path) -> bool {
    matches!(UnixStream::connect(path), Err(error) if error.kind() == ErrorKind::ConnectionRefused)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_folder_that_others_reach_into_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let user = fs::metadata(directory.path()).unwrap().uid();
        let folder = directory.path().join("pilotfish");
        for _ in 0..2 {
            make_private(&folder, user).unwrap();
        }
        assert_eq!(fs::metadata(&folder).unwrap().mode() & 0o777, 0o700);
        let refused = |folder: &Path, user| make_private(folder, user).unwrap_err().to_string();
        assert!(refused(&folder, user + 1).contains("another user"));
        let link = directory.path().join("link");
        symlink(&folder, &link).unwrap();
        assert!(refused(&link, user).contains("no folder"));
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o750)).unwrap();
        assert!(refused(&folder, user).contains("0700"));
    }

    #[test]
    fn what_dead_processes_left_is_removed_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let folder = directory.path();
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        let [dead, own] = [child.id(), std::process::id()].map(|pid| socket_of(folder, pid));
        drop(UnixListener::bind(&dead).unwrap());
        drop(UnixListener::bind(&own).unwrap());
        fs::write(folder.join("notes.sock"), "").unwrap();
        assert!(is_silent(&dead));
        remove_stale(folder);
        assert!(!dead.exists() && own.exists() && folder.join("notes.sock").exists());
        // A dead process's id in another namespace is a living one's here.
        let listener = UnixListener::bind(&dead).unwrap();
        remove_stale(folder);
        assert_eq!(listed(folder).unwrap().len(), 2);
        drop(listener);
    }
}
