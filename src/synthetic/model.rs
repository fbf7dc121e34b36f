use super::gguf::{self, GgufWriter, TensorInfo, Value};
use super::{PlannedTensor, Quantization, Shape, SyntheticError, TensorType, Vocabulary};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Bytes that are made before they are written: what a tensor of any size takes in memory.
const PIECE: u64 = 1 << 20;

/// A model that can be written. The same value always writes the same file.
#[derive(Debug, Clone)]
pub struct SyntheticModel {
    name: String,
    shape: Shape,
    quantization: Quantization,
    seed: u64,
    tensors: Vec<(PlannedTensor, TensorType)>,
}

impl SyntheticModel {
    /// `name` is for people.
    ///
    /// # Errors
    /// A shape that makes no sense, or whose rows the quantization can't hold.
    pub fn new(name: &str, shape: Shape, quantization: Quantization, seed: u64) -> Result<Self, SyntheticError> {
        shape.validate()?;
        let with_type = |tensor: PlannedTensor| {
            let kind = quantization.of(&tensor, &shape)?;
            Ok((tensor, kind))
        };
        let tensors = shape.tensors().into_iter().map(with_type).collect::<Result<_, SyntheticError>>()?;
        Ok(Self { name: name.to_owned(), shape, quantization, seed, tensors })
    }

    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    pub fn n_weights(&self) -> u64 {
        self.tensors.iter().map(|(tensor, _)| tensor.dimensions.iter().product::<u64>()).sum()
    }

    /// Writes the model to `path`, and tells `progress` of bytes done and in all. The file is at `path` when it is whole: until then it is
    /// `PATH.partial`, which an error removes.
    ///
    /// # Errors
    /// The file can't be written, there is no space for it, or another process writes it.
    pub fn write(&self, path: &Path, progress: impl FnMut(u64, u64)) -> Result<(), SyntheticError> {
        if path.is_dir() {
            return Err(SyntheticError::Directory { path: path.to_owned() });
        }
        let mut partial = Partial::create(path)?;
        let mut written = Counted { out: &partial.file, bytes: 0 };
        let outcome = self.write_to(&mut written, progress);
        let written = written.bytes;
        outcome.and_then(|()| partial.file.sync_all()).map_err(|cause| match cause.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                SyntheticError::NoSpace { path: path.to_owned(), needed: self.file_bytes(), written }
            }
            _ => SyntheticError::Io { action: "write", path: partial.path.clone(), cause },
        })?;
        partial.place(path)
    }

    /// Bytes of the file.
    pub fn file_bytes(&self) -> u64 {
        gguf::file_bytes(&self.metadata(), &self.infos())
    }

    /// Writes the model to `out`, and tells `progress` of bytes done and in all.
    ///
    /// # Errors
    /// As `out`'s.
    pub fn write_to(&self, out: impl Write, mut progress: impl FnMut(u64, u64)) -> io::Result<()> {
        let (metadata, infos) = (self.metadata(), self.infos());
        let total = gguf::file_bytes(&metadata, &infos);
        let mut writer = GgufWriter::begin(out, &metadata, &infos)?;
        let mut piece = Vec::new();
        for (index, ((tensor, kind), info)) in self.tensors.iter().zip(&infos).enumerate() {
            // A stream of its own, so that no tensor's values hang on another's size.
            let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
            rng.set_stream(index as u64);
            let mut left = info.bytes();
            while left > 0 {
                let whole_blocks = PIECE - PIECE % kind.block_bytes();
                piece.resize(left.min(whole_blocks) as usize, 0);
                kind.fill(&mut rng, tensor.mean, tensor.deviation, &mut piece);
                writer.put(&piece)?;
                left -= piece.len() as u64;
                progress(writer.written(), total);
            }
        }
        writer.finish()?.flush()
    }

    fn infos(&self) -> Vec<TensorInfo> {
        let info = |(tensor, kind): &(PlannedTensor, TensorType)| TensorInfo {
            name: tensor.name.clone(),
            dimensions: tensor.dimensions.clone(),
            kind: *kind,
        };
        self.tensors.iter().map(info).collect()
    }

    fn metadata(&self) -> Vec<(String, Value)> {
        let vocabulary = Vocabulary::new(&[]).filled(self.shape.vocabulary).expect("a valid shape's vocabulary");
        let mut metadata = self.shape.metadata(&self.name, &vocabulary);
        metadata.push(("general.file_type".to_owned(), Value::Uint32(self.quantization.file_type())));
        // `GGML_QNT_VERSION`
        metadata.push(("general.quantization_version".to_owned(), Value::Uint32(2)));
        metadata
    }
}

/// A file that is not whole yet: gone when dropped before it is put in its place.
struct Partial {
    path: PathBuf,
    file: File,
    placed: bool,
}

impl Partial {
    fn create(whole: &Path) -> Result<Self, SyntheticError> {
        let mut path = whole.as_os_str().to_owned();
        path.push(".partial");
        let path = PathBuf::from(path);
        let io = |action| {
            let path = path.clone();
            move |cause| SyntheticError::Io { action, path, cause }
        };
        // Not emptied before it is known to be nobody else's.
        let file = File::options().write(true).create(true).truncate(false).open(&path).map_err(io("create"))?;
        match file.try_lock() {
            // Another process that held it may have moved it to its place just now.
            Ok(()) if path.exists() => {}
            Ok(()) | Err(TryLockError::WouldBlock) => return Err(SyntheticError::Busy { path: whole.to_owned() }),
            Err(TryLockError::Error(cause)) => return Err(io("lock")(cause)),
        }
        if file.metadata().map_err(io("examine"))?.len() > 0 {
            file.set_len(0).map_err(io("empty"))?;
        }
        Ok(Self { path, file, placed: false })
    }

    fn place(&mut self, whole: &Path) -> Result<(), SyntheticError> {
        let io = |cause| SyntheticError::Io { action: "move the written file to", path: whole.to_owned(), cause };
        fs::rename(&self.path, whole).map_err(io)?;
        self.placed = true;
        // Not every system can sync a directory; the worst case is a file to write again.
        if let Some(directory) = whole.parent().and_then(|directory| File::open(directory).ok()) {
            let _ = directory.sync_all();
        }
        Ok(())
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.placed {
            let _ = fs::remove_file(&self.path);
        }
    }
}

struct Counted<'a> {
    out: &'a File,
    bytes: u64,
}

impl Write for Counted<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.out.write(bytes)?;
        self.bytes += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
