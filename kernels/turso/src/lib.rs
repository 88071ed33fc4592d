//! The names that cubecl-environment takes from the database engine turso. No database is ever opened; what would follow has no values.

use std::fmt;
use std::time::Duration;

pub type Result<T> = std::result::Result<T, Error>;

/// Why something was not done: `Error` is the only one that is ever made.
#[derive(Debug, Clone)]
pub enum Error {
    Busy(String),
    BusySnapshot(String),
    IoError(std::io::ErrorKind, &'static str),
    Error(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Busy(reason) | Error::BusySnapshot(reason) | Error::Error(reason) => f.write_str(reason),
            Error::IoError(kind, what) => write!(f, "{what}: {kind}"),
        }
    }
}

impl std::error::Error for Error {}

/// Would open a database.
#[derive(Debug)]
pub struct Builder;

impl Builder {
    pub fn new_local(_path: &str) -> Builder {
        Builder
    }

    pub fn experimental_multiprocess_wal(self, _is_on: bool) -> Builder {
        self
    }

    pub fn experimental_vacuum(self, _is_on: bool) -> Builder {
        self
    }

    pub fn read_only(self, _is_on: bool) -> Builder {
        self
    }

    /// Opens none.
    ///
    /// # Errors
    /// Always: this build has no database.
    pub async fn build(self) -> Result<Database> {
        Err(Error::Error("this build keeps no database".to_owned()))
    }
}

/// An open database.
#[derive(Debug)]
pub enum Database {}

impl Database {
    pub fn connect(&self) -> Result<Connection> {
        match *self {}
    }
}

/// A connection to one.
#[derive(Debug)]
pub enum Connection {}

impl Connection {
    pub async fn execute<P>(&self, _sql: impl AsRef<str>, _params: P) -> Result<u64> {
        match *self {}
    }

    pub async fn query<P>(&self, _sql: impl AsRef<str>, _params: P) -> Result<Rows> {
        match *self {}
    }

    pub async fn pragma_query<F: FnMut(&Row) -> Result<()>>(&self, _pragma: &str, _each: F) -> Result<()> {
        match *self {}
    }

    pub async fn transaction_with_behavior(
        &mut self,
        _behavior: transaction::TransactionBehavior,
    ) -> Result<transaction::Transaction<'_>> {
        match *self {}
    }

    pub fn busy_timeout(&self, _duration: Duration) -> Result<()> {
        match *self {}
    }
}

/// What a query finds.
#[derive(Debug)]
pub enum Rows {}

impl Rows {
    pub async fn next(&mut self) -> Result<Option<Row>> {
        match *self {}
    }
}

/// One of its rows.
#[derive(Debug)]
pub enum Row {}

impl Row {
    pub fn get<T>(&self, _column: usize) -> Result<T> {
        match *self {}
    }
}

pub mod transaction {
    use super::{Connection, Result};
    use std::ops::Deref;

    /// When a transaction takes its locks.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub enum TransactionBehavior {
        Deferred,
        Immediate,
    }

    /// Writes that happen together.
    #[derive(Debug)]
    pub struct Transaction<'a>(&'a mut Connection);

    impl Transaction<'_> {
        pub async fn commit(self) -> Result<()> {
            match *self.0 {}
        }
    }

    impl Deref for Transaction<'_> {
        type Target = Connection;

        fn deref(&self) -> &Connection {
            self.0
        }
    }
}
