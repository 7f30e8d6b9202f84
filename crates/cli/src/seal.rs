//! `infall seal`, and what it wrote: checksums of a model's experts, beside the model.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Instant;

use store::{Checksums, ExpertExtents, Seal, SealError, StoreError, open_reader};

use crate::load::ModelFile;
use crate::output::Output;
use crate::terminal::{self, Unit, WriteError};
use crate::{Outcome, flags, interrupt, setup};

/// Far more than the seal of any model takes.
const MOST_BYTES: u64 = 1 << 28;

/// Where the seal of the model at `path` is.
fn place(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".seal");
    name.into()
}

/// The checksums of a model that was sealed. A seal that cannot be used is told, and what to do.
///
/// # Errors
/// The model's own files cannot be read.
pub fn of(file: &ModelFile) -> Result<Option<Checksums>, StoreError> {
    let Some(place) = file.paths().next().map(place).filter(|place| place.exists()) else { return Ok(None) };
    let identity = file.source().identity()?;
    let checksums = read(&place).and_then(|seal| Ok(seal.of_model(file.source(), identity, &file.experts())?));
    if let Err(why) = &checksums {
        terminal::note(&terminal::escape_controls(&format!(
            "{}: {why}. Experts are not checked when they are read; make the seal anew with `infall seal -m {}`, or remove it",
            place.display(),
            file.name
        )));
    }
    Ok(checksums.ok())
}

fn read(place: &Path) -> anyhow::Result<Seal> {
    let mut bytes = Vec::new();
    setup::open_regular(place)?.take(MOST_BYTES).read_to_end(&mut bytes)?;
    Ok(Seal::from_bytes(&bytes)?)
}

/// Whether a seal may be written there: nothing is there yet, or a seal, whatever its state.
fn is_free(place: &Path) -> bool {
    let is_foreign = |why: anyhow::Error| matches!(why.downcast_ref(), Some(SealError::Foreign { .. }) | None);
    !place.exists() || !read(place).is_err_and(is_foreign)
}

/// Runs the command.
pub fn seal(flags: &flags::Seal) -> anyhow::Result<Outcome> {
    let file = ModelFile::open(Some(&flags.model))?;
    let place = place(file.paths().next().expect("a model has a file"));
    if !is_free(&place) {
        anyhow::bail!(
            "{}: found a file that `infall seal` did not write, expected none or an earlier seal. Move it away",
            place.display()
        );
    }
    let output = Output::new(&place, file.paths())?;
    let cancel = interrupt::cancel_on_interrupt()?;
    let (reader, note) = open_reader(file.source(), cpu::Options::default().reader)?;
    note.iter().for_each(|note| terminal::dim_note(note));
    let (experts, began) = (file.experts(), Instant::now());
    let experts_bytes = experts.iter().map(ExpertExtents::total_bytes).sum();
    let bar = terminal::progress("sealing", experts_bytes, Unit::Bytes);
    let seal = Seal::make(file.source(), &*reader, &experts, &cancel, &mut |bytes| bar.inc(bytes));
    bar.finish_and_clear();
    let seal = match seal {
        Err(StoreError::Cancelled(_)) => return Ok(Outcome::Interrupted),
        seal => seal?,
    };
    output.write(|out| Ok(out.write_all(&seal.to_bytes()).map_err(WriteError::to(&place))?))?;
    let (bytes, seconds) = (terminal::bytes(experts_bytes), began.elapsed().as_secs_f64());
    terminal::note(&format!("{}: sealed {bytes} of experts in {seconds:.1} s", place.display()));
    Ok(Outcome::Done)
}
