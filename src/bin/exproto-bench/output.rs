//! A file of the report, opened before the run: what cannot be written is found out before
//! anything is measured, and not after it.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::failure::Failure;

/// See the module. What the file held stays until [`Output::save`]; dropped without it, a
/// file that was not there is gone again.
pub struct Output {
    path: PathBuf,
    file: File,
    made: bool,
}

impl Output {
    /// Opens the file, and makes it where it is not there.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn open(path: &Path) -> Result<Self, Failure> {
        let mut options = OpenOptions::new();
        options.write(true);
        let (file, made) = match options.clone().create_new(true).open(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                (options.open(path), false)
            }
            made => (made, true),
        };
        Ok(Self {
            path: path.to_owned(),
            file: file.map_err(|error| unwritable(path, &error))?,
            made,
        })
    }

    /// Writes this in place of what it held.
    ///
    /// # Errors
    /// No room, for one.
    pub fn save(mut self, text: &str) -> Result<(), Failure> {
        self.made = false;
        let whole = self.file.metadata().is_ok_and(|found| found.is_file());
        // A pipe or a terminal has no length.
        let emptied = if whole { self.file.set_len(0) } else { Ok(()) };
        emptied
            .and_then(|()| self.file.write_all(text.as_bytes()))
            .map_err(|error| unwritable(&self.path, &error))
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if self.made {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn unwritable(path: &Path, error: &io::Error) -> Failure {
    Failure::own(&format!("{} cannot be written", path.display()), error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_changes_only_when_something_is_saved() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("report");
        drop(Output::open(&path).unwrap());
        assert!(!path.exists());

        Output::open(&path).unwrap().save("long").unwrap();
        drop(Output::open(&path).unwrap());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "long");
        Output::open(&path).unwrap().save("new").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "new");

        let error = Output::open(&folder.path().join("none/report")).err();
        let said = error.unwrap().to_string();
        assert!(said.contains("none/report cannot be written"), "{said}");
    }

    #[test]
    fn what_is_no_file_is_written_too() {
        Output::open(Path::new("/dev/null"))
            .unwrap()
            .save("text")
            .unwrap();
    }
}
