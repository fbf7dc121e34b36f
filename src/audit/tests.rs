use super::chain::MAX_LINE_BYTES;
use super::files::{beside, is_regular, rotated_files, shown};
use super::time::{civil_from_days, rfc3339};
use super::*;
use proptest::prelude::*;
use serde_json::{Value, json};
use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tempfile::{TempDir, tempdir};

fn clock() -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(1_776_159_000_125)
}

fn open(path: &Path, max_bytes: u64, keep: usize) -> Result<AuditLog, AuditError> {
    AuditLog::open_with_clock(path, AuditOptions { max_bytes, keep }, clock)
}

/// Appends records numbered as their `seq`.
fn append(log: &mut AuditLog, records: u64) {
    for _ in 0..records {
        let number = log.last.seq + 1;
        log.append(&json!({ "decision": "block", "number": number })).unwrap();
    }
}

/// A log of that many records, in files of three.
fn rotated_log(records: u64) -> (TempDir, PathBuf) {
    let directory = tempdir().unwrap();
    let path = directory.path().join("audit.jsonl");
    append(&mut open(&path, 800, 0).unwrap(), records);
    (directory, path)
}

fn names(directory: &TempDir) -> Vec<String> {
    let entries = fs::read_dir(directory.path()).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_line_is_as_documented() {
    let directory = tempdir().unwrap();
    let path = directory.path().join("audit.jsonl");
    let mut log = open(&path, 0, 0).unwrap();
    let first = log.append(&json!({ "text": "a\n\",\"hash\":\"" })).unwrap();
    let second = log.append(&json!({})).unwrap();
    let text = fs::read_to_string(&path).unwrap();
    let zeros = "0".repeat(64);
    let hashed = format!(
        r#"{{"seq":1,"time":"2026-04-14T09:30:00.125Z","prev":"{zeros}","record":{{"text":"a\n\",\"hash\":\""}}"#
    );
    assert_eq!(first, Appended { seq: 1, hash: ChainHash::of(hashed.as_bytes()) });
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines[0], format!(r#"{hashed},"hash":"{}"}}"#, first.hash));
    let value: Value = serde_json::from_str(lines[1]).unwrap();
    assert_eq!(value["prev"], first.hash.to_string());
    assert_eq!(value["hash"], second.hash.to_string());
    assert_eq!(lines.len(), 2);
    assert!(text.ends_with('\n'));
}

#[test]
fn a_chain_goes_on_when_it_is_opened_again_and_verifies() {
    let directory = tempdir().unwrap();
    let path = directory.path().join("audit.jsonl");
    assert!(matches!(verify(&path), Err(AuditError::Io { .. })));
    drop(open(&path, 0, 0).unwrap());
    let empty = Verified { records: 0, first_seq: 0, last_seq: 0, last_hash: ChainHash::ZERO, files: 1 };
    assert_eq!(verify(&path).unwrap(), empty);
    for opened in 1..4 {
        let mut log = open(&path, 0, 0).unwrap();
        append(&mut log, 2);
        log.sync().unwrap();
        let last_hash = log.last.hash;
        let expected = Verified { records: 2 * opened, first_seq: 1, last_seq: 2 * opened, last_hash, files: 1 };
        assert_eq!(verify(&path).unwrap(), expected);
    }
}

#[cfg(unix)]
#[test]
fn files_are_private_and_neither_links_nor_devices() {
    use std::os::unix::fs::{PermissionsExt, symlink};
    let (directory, path) = rotated_log(4);
    for name in names(&directory) {
        let mode = fs::metadata(directory.path().join(&name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
    let link = directory.path().join("link");
    symlink(&path, &link).unwrap();
    for path in [&link, Path::new("/dev/null"), directory.path()] {
        assert!(matches!(is_regular(path), Err(AuditError::NotAFile { .. })));
    }
    assert!(matches!(open(&link, 0, 0), Err(AuditError::NotAFile { .. })));
    assert!(matches!(verify(&link), Err(AuditError::NotAFile { .. })));
}

#[test]
fn rotation_keeps_the_chain_and_as_many_files_as_asked() {
    let (directory, path) = rotated_log(10);
    let expected = ["audit.jsonl", "audit.jsonl.1", "audit.jsonl.4", "audit.jsonl.7", "audit.jsonl.lock"];
    assert_eq!(names(&directory), expected);
    let verified = verify(&path).unwrap();
    assert_eq!((verified.records, verified.first_seq, verified.last_seq, verified.files), (10, 1, 10, 4));
    for name in &expected[..4] {
        assert!(fs::metadata(directory.path().join(name)).unwrap().len() <= 800);
    }

    append(&mut open(&path, 800, 2).unwrap(), 3);
    assert_eq!(names(&directory), ["audit.jsonl", "audit.jsonl.10", "audit.jsonl.7", "audit.jsonl.lock"]);
    let verified = verify(&path).unwrap();
    assert_eq!((verified.records, verified.first_seq, verified.last_seq, verified.files), (7, 7, 13, 3));

    // A record that alone is too large has a file of its own.
    append(&mut open(&path, 1, 0).unwrap(), 2);
    let verified = verify(&path).unwrap();
    assert_eq!((verified.last_seq, verified.files), (15, 5));
}

#[test]
fn a_rotation_that_a_crash_cut_short_is_completed() {
    let (directory, path) = rotated_log(3);
    fs::rename(&path, beside(&path, ".1")).unwrap();
    assert_eq!(verify(&path).unwrap().records, 3);
    append(&mut open(&path, 800, 0).unwrap(), 1);
    assert_eq!(verify(&path).unwrap().last_seq, 4);
    assert_eq!(names(&directory), ["audit.jsonl", "audit.jsonl.1", "audit.jsonl.lock"]);
}

#[test]
fn a_rotation_replaces_no_file() {
    let (_directory, path) = rotated_log(3);
    let mut log = open(&path, 800, 0).unwrap();
    fs::write(beside(&path, ".1"), "precious").unwrap();
    for _ in 0..2 {
        assert!(matches!(log.append(&json!({})), Err(AuditError::RotatedExists { .. })));
    }
    assert_eq!(fs::read(beside(&path, ".1")).unwrap(), b"precious");
}

#[test]
fn the_log_has_one_writer() {
    let (_directory, path) = rotated_log(1);
    let mut log = open(&path, 800, 0).unwrap();
    assert!(matches!(open(&path, 800, 0), Err(AuditError::Locked { .. })));
    append(&mut log, 5);
    assert!(matches!(open(&path, 800, 0), Err(AuditError::Locked { .. })), "not after a rotation either");
    drop(log);
    open(&path, 800, 0).unwrap();
}

#[test]
fn a_torn_last_line_is_set_aside_wherever_it_was_cut() {
    let (_whole, whole) = rotated_log(5);
    let (full, tail) = (fs::read(beside(&whole, ".1")).unwrap(), fs::read(&whole).unwrap());
    let directory = tempdir().unwrap();
    for cut in 0..=tail.len() {
        let path = directory.path().join(format!("{cut}.jsonl"));
        fs::write(beside(&path, ".1"), &full).unwrap();
        fs::write(&path, &tail[..cut]).unwrap();
        let lines = tail[..cut].iter().filter(|byte| **byte == b'\n').count();
        let torn = tail[..cut].rsplit(|byte| *byte == b'\n').next().unwrap();
        if !torn.is_empty() {
            let expected = format!("{}:{}: {}", shown(&path), lines + 1, ChainFault::Torn);
            assert_eq!(verify(&path).unwrap_err().to_string(), expected);
        }
        append(&mut open(&path, 0, 0).unwrap(), 1);
        let verified = verify(&path).unwrap();
        assert_eq!((verified.last_seq, verified.files), (3 + lines as u64 + 1, 2), "cut at {cut}");
        let aside = beside(&path, &format!(".torn-{}", 3 + lines + 1));
        assert_eq!(fs::read(&aside).unwrap_or_default(), torn, "cut at {cut}");
        assert_eq!(aside.exists(), !torn.is_empty());
    }
}

#[test]
fn what_was_torn_before_is_not_replaced() {
    let (_directory, path) = rotated_log(2);
    for torn in ["first", "second"] {
        OpenOptions::new().append(true).open(&path).unwrap().write_all(torn.as_bytes()).unwrap();
        open(&path, 0, 0).unwrap();
    }
    assert_eq!(fs::read(beside(&path, ".torn-3")).unwrap(), b"first");
    assert_eq!(fs::read(beside(&path, ".torn-3.2")).unwrap(), b"second");
}

#[test]
fn a_tail_that_is_no_chain_is_not_continued() {
    let (_directory, path) = rotated_log(5);
    let tail = fs::read_to_string(&path).unwrap();
    let refuses = |text: &str, expected_which: &str, expected_fault: ChainFault| {
        fs::write(&path, text).unwrap();
        match open(&path, 0, 0) {
            Err(AuditError::NoChain { which, fault, .. }) => {
                assert_eq!((which, fault), (expected_which, expected_fault))
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), text, "it is left as it is");
    };
    refuses("\n", "last", ChainFault::Malformed);
    refuses(&format!("{tail}{{}}\n"), "last", ChainFault::Malformed);
    refuses(&tail.replace("\"number\":5", "\"number\":6"), "last", ChainFault::Edited);
    refuses(&tail.replace("\"number\":4", "\"number\":6"), "first", ChainFault::Edited);
    let second = tail.split_inclusive('\n').nth(1).unwrap();
    refuses(second, "first", ChainFault::Seq { expected: 4, found: 5 });
}

#[test]
fn a_log_without_its_first_record_or_file_is_found_out() {
    let (_directory, path) = rotated_log(3);
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.split_once('\n').unwrap().1).unwrap();
    let removed = ChainFault::Seq { expected: 1, found: 2 };
    assert!(matches!(verify(&path), Err(AuditError::Broken { line: 1, fault, .. }) if fault == removed));

    let (_directory, path) = rotated_log(9);
    fs::remove_file(beside(&path, ".4")).unwrap();
    let removed = ChainFault::Seq { expected: 4, found: 7 };
    assert!(matches!(verify(&path), Err(AuditError::Broken { line: 1, fault, .. }) if fault == removed));

    let (_directory, path) = rotated_log(9);
    fs::rename(beside(&path, ".4"), beside(&path, ".5")).unwrap();
    let renamed = ChainFault::Name { expected: 5, found: 4 };
    assert!(matches!(verify(&path), Err(AuditError::Broken { line: 1, fault, .. }) if fault == renamed));
}

#[test]
fn a_record_forged_with_its_own_hash_breaks_the_chain_after_it() {
    let (_directory, path) = rotated_log(3);
    let text = fs::read_to_string(&path).unwrap();
    let mut lines: Vec<_> = text.lines().map(str::to_owned).collect();
    let hashed = lines[1].split(",\"hash\"").next().unwrap().replace("block", "allow");
    lines[1] = format!(r#"{hashed},"hash":"{}"}}"#, ChainHash::of(hashed.as_bytes()));
    fs::write(&path, lines.join("\n") + "\n").unwrap();
    let error = verify(&path).unwrap_err();
    assert!(matches!(error, AuditError::Broken { line: 3, fault: ChainFault::Prev { .. }, .. }), "{error}");
}

#[derive(Debug, Clone)]
enum Tampering {
    Byte(prop::sample::Index, u8),
    Remove(prop::sample::Index),
    Swap(prop::sample::Index, prop::sample::Index),
    Duplicate(prop::sample::Index, prop::sample::Index),
}

fn tampering() -> impl Strategy<Value = Tampering> {
    let index = any::<prop::sample::Index>;
    prop_oneof![
        4 => (index(), prop_oneof![1..=255_u8, Just(b'\n')]).prop_map(|(at, flip)| Tampering::Byte(at, flip)),
        1 => index().prop_map(Tampering::Remove),
        1 => (index(), index()).prop_map(|(one, other)| Tampering::Swap(one, other)),
        1 => (index(), index()).prop_map(|(from, to)| Tampering::Duplicate(from, to)),
    ]
}

/// Files of a log and their lines.
type Lines = Vec<(PathBuf, Vec<Vec<u8>>)>;

/// File and line of a line counted through all files.
fn place(files: &Lines, mut index: usize) -> (usize, usize) {
    for (file, (_, lines)) in files.iter().enumerate() {
        if index < lines.len() {
            return (file, index);
        }
        index -= lines.len();
    }
    unreachable!()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn tampering_is_found_and_named(tampering in tampering()) {
        static LOG: OnceLock<Lines> = OnceLock::new();
        const RECORDS: usize = 11;
        let log = LOG.get_or_init(|| {
            let (directory, _) = rotated_log(RECORDS as u64);
            let lines = |name| {
                let bytes = fs::read(directory.path().join(name)).unwrap();
                bytes.split_inclusive(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect()
            };
            ["audit.jsonl.1", "audit.jsonl.4", "audit.jsonl.7", "audit.jsonl"].map(|name| (PathBuf::from(name), lines(name))).to_vec()
        });
        let directory = tempdir().unwrap();
        let mut files: Lines =
            log.iter().map(|(name, lines)| (directory.path().join(name), lines.clone())).collect();
        let lines: Vec<Vec<u8>> = files.iter().flat_map(|(_, lines)| lines.clone()).collect();

        match tampering {
            Tampering::Byte(at, flip) => {
                let mut at = at.index(lines.iter().map(Vec::len).sum());
                let line = lines.iter().position(|line| {
                    let here = at < line.len();
                    at -= if here { 0 } else { line.len() };
                    here
                });
                let (file, line) = place(&files, line.unwrap());
                let byte = &mut files[file].1[line][at];
                // As a flip, or as the newline that splits the line.
                *byte = if flip == b'\n' && *byte != b'\n' { b'\n' } else { *byte ^ flip };
            }
            // Without a hash noted elsewhere the last can't be missed.
            Tampering::Remove(at) => {
                let (file, line) = place(&files, at.index(RECORDS - 1));
                files[file].1.remove(line);
            }
            Tampering::Swap(one, other) => {
                let (one, other) = (one.index(RECORDS), other.index(RECORDS));
                prop_assume!(one != other);
                let ((one_file, one_line), (other_file, other_line)) = (place(&files, one), place(&files, other));
                files[one_file].1[one_line] = lines[other].clone();
                files[other_file].1[other_line] = lines[one].clone();
            }
            Tampering::Duplicate(from, to) => {
                let (file, line) = place(&files, to.index(RECORDS));
                files[file].1.insert(line, lines[from.index(RECORDS)].clone());
            }
        }

        let mut expected = None;
        let mut whole = lines.iter();
        for (path, found) in &files {
            fs::write(path, found.concat()).unwrap();
            let same = found.iter().take_while(|line| whole.next() == Some(*line)).count();
            if expected.is_none() && same < found.len() {
                expected = Some((shown(path), same as u64 + 1));
            }
        }
        let found = match verify(&directory.path().join("audit.jsonl")) {
            Err(AuditError::Broken { file, line, .. }) => Some((file, line)),
            _ => None,
        };
        prop_assert!(expected.is_some());
        prop_assert_eq!(found, expected);
    }

    #[test]
    fn a_day_is_the_one_after_the_day_before(days in -719_528_i64..2_932_896) {
        let (year, month, day) = civil_from_days(days);
        let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
        let length = [31, 28 + i64::from(leap), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31][month as usize - 1];
        let next = match (month, day) {
            (12, 31) => (year + 1, 1, 1),
            (_, day) if day == length => (year, month + 1, 1),
            _ => (year, month, day + 1),
        };
        prop_assert_eq!(civil_from_days(days + 1), next);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(50))]

    #[test]
    fn any_record_survives(text in any::<String>(), number in any::<f64>()) {
        let directory = tempdir().unwrap();
        let path = directory.path().join("audit.jsonl");
        let mut log = open(&path, 0, 0).unwrap();
        for _ in 0..2 {
            log.append(&json!({ "text": text, "number": number })).unwrap();
        }
        prop_assert_eq!(verify(&path).unwrap().last_hash, log.last.hash);
        let line = fs::read_to_string(&path).unwrap().lines().last().unwrap().to_owned();
        let value: Value = serde_json::from_str(&line).unwrap();
        prop_assert_eq!(&value["record"]["text"], &json!(text));
    }
}

#[test]
fn times_are_rfc_3339() {
    let after = |milliseconds| rfc3339(UNIX_EPOCH + Duration::from_millis(milliseconds));
    assert_eq!(after(0), "1970-01-01T00:00:00.000Z");
    assert_eq!(after(951_782_399_999), "2000-02-28T23:59:59.999Z");
    assert_eq!(after(951_782_400_000), "2000-02-29T00:00:00.000Z");
    assert_eq!(after(1_709_251_199_000), "2024-02-29T23:59:59.000Z");
    assert_eq!(after(4_107_542_400_000), "2100-03-01T00:00:00.000Z");
    assert_eq!(after(253_402_300_799_999), "9999-12-31T23:59:59.999Z");
    assert_eq!(after(253_402_300_800_000), "9999-12-31T23:59:59.999Z");
    assert_eq!(rfc3339(UNIX_EPOCH - Duration::from_nanos(1)), "1969-12-31T23:59:59.999Z");
    assert_eq!(rfc3339(UNIX_EPOCH - Duration::from_secs(62_167_219_201)), "0000-01-01T00:00:00.000Z");
}

const KILLED_LOG: &str = "PILOTFISH_TEST_KILLED_AUDIT_LOG";

/// Appends until it is killed, by the test below. Does nothing when it is run as a test.
#[test]
fn child_that_is_killed() {
    let Some(path) = std::env::var_os(KILLED_LOG) else { return };
    let mut log = open(path.as_ref(), 5_000, 0).unwrap();
    let text = "x".repeat(300);
    loop {
        let Appended { seq, hash } = log.append(&json!({ "text": text })).unwrap();
        // On a line of its own whatever the test harness prints. It fails, and ends the child, when the parent is gone.
        io::stdout().write_all(format!("\nack {seq} {hash}\n").as_bytes()).unwrap();
    }
}

#[cfg(unix)]
#[test]
fn no_acknowledged_record_is_lost_to_sigkill() {
    let (_directory, path) = rotated_log(0);
    let module = module_path!().split_once("::").unwrap().1;
    for round in 0..5 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &format!("{module}::child_that_is_killed"), "--nocapture"])
            .env(KILLED_LOG, &path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut acknowledged = Vec::new();
        for line in BufReader::new(child.stdout.take().unwrap()).lines() {
            let line = line.unwrap();
            if let Some((seq, hash)) = line.strip_prefix("ack ").and_then(|ack| ack.split_once(' ')) {
                acknowledged.push((seq.to_owned(), hash.to_owned()));
            }
            if acknowledged.len() == 50 + 7 * round {
                child.kill().unwrap();
            }
        }
        child.wait().unwrap();
        assert!(acknowledged.len() >= 50 + 7 * round);

        append(&mut open(&path, 5_000, 0).unwrap(), 1);
        verify(&path).unwrap();
        let mut files: Vec<_> = rotated_files(&path).unwrap().into_iter().map(|file| file.path).collect();
        files.push(path.clone());
        let text: String = files.iter().map(|file| fs::read_to_string(file).unwrap()).collect();
        for (seq, hash) in acknowledged {
            let line = text.lines().nth(seq.parse::<usize>().unwrap() - 1).unwrap();
            assert!(line.starts_with(&format!("{{\"seq\":{seq},")) && line.contains(&hash));
        }
    }
}

#[test]
fn the_log_is_verified_while_it_is_written_and_rotated() {
    let (_directory, path) = rotated_log(1);
    thread::scope(|scope| {
        let writing = scope.spawn(|| append(&mut open(&path, 8_000, 0).unwrap(), 2_000));
        while !writing.is_finished() {
            verify(&path).unwrap();
        }
    });
    assert_eq!(verify(&path).unwrap().records, 2_001);
}

#[test]
fn eight_threads_share_a_writer() {
    let (_directory, path) = rotated_log(0);
    let writer = AuditWriter::start(open(&path, 10_000, 0).unwrap(), 16).unwrap();
    let mut seqs: Vec<u64> = thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|thread| {
                let writer = &writer;
                scope.spawn(move || {
                    let record = |number| writer.record(json!({ "thread": thread, "number": number })).unwrap();
                    (0..100).map(|number| record(number).wait().unwrap().seq).collect::<Vec<_>>()
                })
            })
            .collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    seqs.sort();
    assert_eq!(seqs, (1..=800).collect::<Vec<_>>());
    let verified = verify(&path).unwrap();
    assert_eq!((verified.records, verified.last_seq), (800, 800));
    assert!(verified.files > 1);
}

#[test]
fn a_dropped_writer_writes_what_waits() {
    let (_directory, path) = rotated_log(0);
    let writer = AuditWriter::start(open(&path, 0, 0).unwrap(), 100).unwrap();
    let receipts: Vec<_> = (0..50).map(|number| writer.record(json!(number)).unwrap()).collect();
    drop(writer);
    assert_eq!(verify(&path).unwrap().records, 50);
    for (receipt, seq) in receipts.into_iter().zip(1..) {
        assert_eq!(receipt.wait().unwrap().seq, seq);
    }
    open(&path, 0, 0).unwrap();
}

#[test]
fn answers_come_by_call_as_well_and_their_panics_harm_nobody() {
    let (_directory, path) = rotated_log(0);
    let writer = Arc::new(AuditWriter::start(open(&path, 0, 0).unwrap(), 2).unwrap());
    let (sender, answers) = channel();
    let (go, wait) = channel::<()>();
    let (at_work, started) = channel();
    writer.record_then(json!(1), move |_| {
        at_work.send(()).unwrap();
        wait.recv().unwrap();
        panic!("of the test");
    });
    started.recv().unwrap();
    for _ in 0..3 {
        let sender = sender.clone();
        writer.record_then(json!(2), move |result| sender.send(result).unwrap());
    }
    assert!(matches!(answers.recv().unwrap(), Err(AuditError::Full { capacity: 2 })), "while the thread is held up");
    go.send(()).unwrap();
    assert_eq!(answers.recv().unwrap().unwrap().seq, 2);
    assert_eq!(answers.recv().unwrap().unwrap().seq, 3);

    // The last reference is dropped on the writer's own thread.
    let held = Arc::clone(&writer);
    let (go, wait) = channel::<()>();
    writer.record_then(json!(4), move |result| {
        wait.recv().unwrap();
        drop(held);
        sender.send(result).unwrap();
    });
    drop(writer);
    go.send(()).unwrap();
    assert_eq!(answers.recv().unwrap().unwrap().seq, 4);
}

#[test]
fn a_record_that_is_none_fails_alone() {
    let (_directory, path) = rotated_log(0);
    let mut log = open(&path, 0, 0).unwrap();
    let no_key = std::collections::BTreeMap::from([((1, 2), 3)]);
    assert!(matches!(log.append(&no_key), Err(AuditError::Record { .. })));
    let text = "x".repeat(MAX_LINE_BYTES as usize);
    assert!(matches!(log.append(&text), Err(AuditError::TooLarge { .. })));
    let (longest, line) = log.line(&"").unwrap();
    assert_eq!(longest.seq, 1);
    log.append(&&text[line.len()..]).unwrap();
    assert_eq!(log.bytes, MAX_LINE_BYTES);
    assert_eq!(verify(&path).unwrap().records, 1);
    drop(log);
    open(&path, 0, 0).unwrap();
}

/// Its writes go to a device: `/dev/full` fails to write, `/dev/null` to sync.
#[cfg(target_os = "linux")]
fn failing_log(path: &Path, device: &str) -> AuditLog {
    let mut log = open(path, 0, 0).unwrap();
    log.file = OpenOptions::new().write(true).open(device).unwrap();
    log
}

#[cfg(target_os = "linux")]
#[test]
fn a_log_that_failed_stays_failed() {
    let (_directory, path) = rotated_log(2);
    let mut log = failing_log(&path, "/dev/full");
    let error = log.append(&json!({})).unwrap_err();
    assert!(matches!(error, AuditError::Io { action: "write", .. }), "{error}");
    log.file = OpenOptions::new().append(true).open(&path).unwrap();
    assert_eq!(log.append(&json!({})).unwrap_err().to_string(), error.to_string());
    assert_eq!(log.sync().unwrap_err().to_string(), error.to_string());
    drop(log);
    append(&mut open(&path, 0, 0).unwrap(), 1);
    assert_eq!(verify(&path).unwrap().records, 3);
}

#[cfg(target_os = "linux")]
#[test]
fn a_writer_fails_closed_and_acknowledges_nothing_that_is_not_synced() {
    for (device, action) in [("/dev/full", "write"), ("/dev/null", "sync")] {
        let (_directory, path) = rotated_log(0);
        let writer = AuditWriter::start(failing_log(&path, device), 4).unwrap();
        let error = writer.record(json!({})).unwrap().wait().unwrap_err();
        assert!(matches!(error, AuditError::Io { action: found, .. } if found == action), "{error}");
        assert_eq!(writer.record(json!({})).unwrap_err().to_string(), error.to_string());
        let (sender, answer) = channel();
        writer.record_then(json!({}), move |result| sender.send(result).unwrap());
        assert_eq!(answer.recv().unwrap().unwrap_err().to_string(), error.to_string());
    }
}
