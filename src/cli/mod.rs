//! The command line: what can be asked for, and how results and failures become output and exit
//! codes.

mod arguments;
mod audit;
mod cleanup;
mod config;
mod kernel;
mod plan;
mod rights;
mod run;
mod source;
mod version;

use std::io::{self, IsTerminal};
use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use tracing_subscriber::EnvFilter;

use arguments::{Arguments, Command, LogFormat};

/// Something is not as it should be: drift, a refused Service, an object that is not understood.
const FOUND_SOMETHING: u8 = 1;
/// The command could not do its work: wrong usage, no rights, no nf_tables, no source.
const COULD_NOT: u8 = 2;

/// What is logged where nobody chooses. The watchers of the API server tell of each failed attempt to
/// reach it; that it is away and that it is back is said once, by us.
const DEFAULT_LOGS: &str = "info,kube_client=off,kube_runtime=error";

/// Runs the command that the process was started with.
pub fn main() -> ExitCode {
    rights::claim();
    let arguments = Arguments::parse();
    let result = log_to_stderr(arguments.log_format).and_then(|()| run_command(&arguments.command));
    match result {
        Ok(Verdict::Fine) => ExitCode::SUCCESS,
        Ok(Verdict::FoundSomething) => ExitCode::from(FOUND_SOMETHING),
        Err(error) => {
            // One line, the causes behind colons.
            eprintln!("portcullis: {error:#}");
            ExitCode::from(COULD_NOT)
        }
    }
}

fn run_command(command: &Command) -> anyhow::Result<Verdict> {
    match command {
        Command::Run(options) => run::run(options),
        Command::Plan(options) => plan::plan(options),
        Command::Audit(options) => audit::audit(options),
        Command::Cleanup(options) => cleanup::cleanup(options),
        Command::Version(options) => version::version(options),
        Command::Completions { shell } => {
            let mut command = Arguments::command();
            clap_complete::generate(*shell, &mut command, "portcullis", &mut io::stdout());
            Ok(Verdict::Fine)
        }
    }
}

/// What a command that did its work has to say with its exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Fine,
    FoundSomething,
}

impl Verdict {
    fn found(something: bool) -> Verdict {
        if something { Verdict::FoundSomething } else { Verdict::Fine }
    }
}

fn log_to_stderr(format: LogFormat) -> anyhow::Result<()> {
    let filter = match std::env::var(EnvFilter::DEFAULT_ENV) {
        Ok(directives) if !directives.is_empty() => directives.parse().map_err(|error| {
            let name = EnvFilter::DEFAULT_ENV;
            anyhow::anyhow!("{name}={directives:?} is not understood: {error}")
        })?,
        // Neither set nor readable.
        _ => EnvFilter::new(DEFAULT_LOGS),
    };
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    match format {
        LogFormat::Text => logs.with_ansi(io::stderr().is_terminal()).init(),
        LogFormat::Json => logs.json().flatten_event(true).init(),
    }
    Ok(())
}

/// Prints to standard output; a reader that went away (`| head`) ends the program quietly, as it
/// does other commands.
fn print(text: &str) -> anyhow::Result<()> {
    use std::io::Write;
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        result => {
            result.map_err(|error| anyhow::Error::from(error).context("cannot write the output"))
        }
    }
}
