//! The file a command writes: it takes its place whole or not at all.

use std::fs::{File, Permissions};
use std::io::{BufWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tempfile::TempPath;

use crate::terminal::WriteError;

/// Where results go. Until they are complete, nothing of that name comes to be or changes.
pub struct Output {
    /// As the user wrote it.
    name: PathBuf,
    target: Target,
}

enum Target {
    /// A device or a pipe, written to as it is.
    Direct(File),
    /// A regular file at this path, behind all links, with these permissions once it is written.
    File(PathBuf, Permissions),
}

impl Output {
    /// The output at `path`, which creates no file.
    ///
    /// # Errors
    /// It cannot be written to, or it is one of `inputs`.
    pub fn new<'a>(path: &Path, inputs: impl IntoIterator<Item = &'a Path>) -> anyhow::Result<Output> {
        let target = find(path).map_err(WriteError::to(path))?;
        if let Target::File(target, _) = &target {
            let same = |input: &&Path| input.canonicalize().is_ok_and(|input| input == *target);
            if let Some(input) = inputs.into_iter().find(same) {
                anyhow::bail!(
                    "{}: found {} itself, which is read; expected another file to write to. Give --out another name",
                    path.display(),
                    input.display()
                );
            }
        }
        Ok(Output { name: path.to_owned(), target })
    }

    /// As the user wrote it.
    pub fn name(&self) -> &Path {
        &self.name
    }

    /// Writes what `fill` writes. A regular file grows under a temporary name beside its own (`NAME.….part`) and is
    /// renamed at the end; if something fails, it is removed and an older file of that name stays.
    ///
    /// # Errors
    /// Those of `fill`, or the output cannot be written to.
    pub fn write(self, fill: impl FnOnce(&mut dyn Write) -> anyhow::Result<()>) -> anyhow::Result<()> {
        let mut part = self.open()?;
        fill(&mut part)?;
        part.keep()
    }

    /// Begins to write, as [`Output::write`] does; what is dropped before [`Part::keep`] leaves nothing.
    ///
    /// # Errors
    /// The output cannot be written to.
    pub fn open(self) -> anyhow::Result<Part> {
        let (file, target) = match self.target {
            Target::Direct(file) => (file, None),
            Target::File(path, permissions) => {
                let prefix = path.file_name().unwrap_or_default().to_string_lossy().into_owned() + ".";
                let mut builder = tempfile::Builder::new();
                builder.prefix(&prefix).suffix(".part").permissions(permissions);
                let part = builder.tempfile_in(folder(&path)).map_err(WriteError::to(&self.name))?;
                let (file, part) = part.into_parts();
                (file, Some((part, path)))
            }
        };
        Ok(Part { name: self.name, file: BufWriter::new(file), target })
    }
}

/// An output that is being written.
pub struct Part {
    name: PathBuf,
    file: BufWriter<File>,
    /// The temporary name, and the one to take; `None` for what is written to directly.
    target: Option<(TempPath, PathBuf)>,
}

impl Part {
    /// It is whole, and takes its place.
    ///
    /// # Errors
    /// The output cannot be written to.
    pub fn keep(mut self) -> anyhow::Result<()> {
        let unwritable = || WriteError::to(&self.name);
        self.file.flush().map_err(unwritable())?;
        if let Some((part, path)) = self.target {
            self.file.get_ref().sync_all().map_err(unwritable())?;
            part.persist(path).map_err(|error| unwritable()(error.error))?;
        }
        Ok(())
    }
}

impl Write for Part {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

/// What `path` is, after a trial that it can be written to.
fn find(path: &Path) -> std::io::Result<Target> {
    let target = match File::options().write(true).open(path) {
        Ok(file) => match file.metadata()? {
            metadata if metadata.is_file() => Target::File(path.canonicalize()?, metadata.permissions()),
            _ => Target::Direct(file),
        },
        // As other programs create files: the system takes away what the user's umask forbids.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Target::File(path.to_owned(), Permissions::from_mode(0o666))
        }
        Err(error) => return Err(error),
    };
    if let Target::File(path, _) = &target {
        // A file without a name, of which nothing stays even if the process is ended right here.
        tempfile::tempfile_in(folder(path))?;
    }
    Ok(target)
}

fn folder(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
