//! The command line: what can be asked for, and how results and failures become output and exit
//! codes.

mod arguments;
mod audit;
mod cleanup;
mod config;
mod kernel;
mod logs;
mod plan;
mod rights;
mod run;
mod source;
mod version;

use std::io;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use arguments::{Arguments, Command};
use logs::Logs;

/// Something is not as it should be: drift, a refused Service, an object that is not understood.
const FOUND_SOMETHING: u8 = 1;
/// The command could not do its work: wrong usage, no rights, no nf_tables, no source.
const COULD_NOT: u8 = 2;

/// Runs the command that the process was started with.
pub fn main() -> ExitCode {
    rights::claim();
    let arguments = Arguments::parse();
    let mut logs = Logs::default();
    let is_daemon = matches!(&arguments.command, Command::Run(options) if !options.once);
    let result = logs.start(arguments.log_format, is_daemon);
    match result.and_then(|()| run_command(&arguments.command, &logs)) {
        Ok(Verdict::Fine) => ExitCode::SUCCESS,
        Ok(Verdict::FoundSomething) => ExitCode::from(FOUND_SOMETHING),
        Err(error) => {
            // One line, the causes behind colons.
            logs.say(&format!("portcullis: {error:#}"));
            ExitCode::from(COULD_NOT)
        }
    }
}

fn run_command(command: &Command, logs: &Logs) -> anyhow::Result<Verdict> {
    match command {
        Command::Run(options) => run::run(options, logs),
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
