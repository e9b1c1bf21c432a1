// Command upstream extracts the facts of upstream Kubernetes' own tables for Service proxies: what
// goes into each case, and what upstream's test expects to come out. It writes them as JSON.
//
// It runs upstream's tests, which must pass, with a few calls of our own inserted: see overlay.go.
// Nothing of upstream's text is kept, not even the names of its cases; a case is known by the line
// at which it stands.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
)

const upstream = "k8s.io/kubernetes"

// A source is a package of upstream's whose tests are run.
type source struct {
	// Directory in this module that has our part of the package.
	ours string
	// Directory of the package in upstream's module.
	theirs string
	// Which tests to run.
	tests string
	// What is inserted.
	insertions []insertion
	// The file that the facts go to.
	facts string
	// The file whose lines the facts name.
	table string
}

var sources = []source{
	{
		ours:       "proxy",
		theirs:     "pkg/proxy",
		tests:      "^TestCategorizeEndpoints$",
		insertions: endpointInsertions,
		facts:      "categorize-endpoints.json",
		table:      "topology_test.go",
	},
	{
		ours:       "nftables",
		theirs:     "pkg/proxy/nftables",
		tests:      ".",
		insertions: flowInsertions,
		facts:      "packet-flows.json",
		table:      "proxier_test.go",
	},
}

// An origin says where facts come from.
type origin struct {
	Module    string   `json:"module"`
	Version   string   `json:"version"`
	File      string   `json:"file"`
	Functions []string `json:"functions"`
	MadeBy    string   `json:"madeBy"`
}

// A module as `go mod download -json` describes it.
type module struct {
	Version, Dir string
}

func main() {
	out := flag.String("out", "facts", "directory that the facts are written to")
	flag.Parse()
	if err := run(*out); err != nil {
		fmt.Fprintln(os.Stderr, "upstream:", err)
		os.Exit(1)
	}
}

func run(out string) error {
	description, err := output("go", "mod", "download", "-json", upstream)
	if err != nil {
		return err
	}
	var module module
	if err := json.Unmarshal(description, &module); err != nil {
		return fmt.Errorf("go mod download: %w", err)
	}
	scratch, err := os.MkdirTemp("", "upstream-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(scratch)
	for _, source := range sources {
		cases, err := source.extract(module, scratch)
		if err != nil {
			return fmt.Errorf("%s: %w", source.theirs, err)
		}
		if err := source.write(module, cases, filepath.Join(out, source.facts)); err != nil {
			return err
		}
	}
	return nil
}

// extract builds the package's tests with our insertions, runs them, and returns what our calls
// wrote: one JSON object for each case.
func (source source) extract(module module, scratch string) ([]json.RawMessage, error) {
	overlay, err := source.overlay(module.Dir, scratch)
	if err != nil {
		return nil, err
	}
	binary := filepath.Join(scratch, source.ours+".test")
	build := []string{"test", "-c", "-mod=readonly", "-vet=off", "-tags=upstream"}
	build = append(build, "-overlay="+overlay, "-o="+binary, "./"+source.ours)
	if _, err := output("go", build...); err != nil {
		return nil, err
	}
	record := filepath.Join(scratch, source.ours+".jsonl")
	test := exec.Command(binary, "-test.run="+source.tests, "-test.count=1")
	test.Dir = scratch
	test.Env = append(os.Environ(), "UPSTREAM_RECORD="+record)
	if text, err := test.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("upstream's tests: %w\n%s", err, text)
	}
	written, err := os.ReadFile(record)
	if err != nil {
		return nil, fmt.Errorf("upstream's tests ran none of our calls: %w", err)
	}
	var cases []json.RawMessage
	for line := range bytes.Lines(written) {
		cases = append(cases, bytes.Clone(bytes.TrimSpace(line)))
	}
	return cases, nil
}

func (source source) write(module module, cases []json.RawMessage, path string) error {
	var functions []string
	for _, one := range cases {
		var test struct{ Test string }
		if err := json.Unmarshal(one, &test); err != nil {
			return err
		}
		if !slices.Contains(functions, test.Test) {
			functions = append(functions, test.Test)
		}
	}
	facts, err := json.Marshal(struct {
		Origin origin            `json:"origin"`
		Cases  []json.RawMessage `json:"cases"`
	}{
		origin{
			Module:    upstream,
			Version:   module.Version,
			File:      source.theirs + "/" + source.table,
			Functions: functions,
			MadeBy:    "integration/upstream/extract.sh",
		},
		cases,
	})
	if err != nil {
		return err
	}
	var text bytes.Buffer
	if err := layOut(&text, facts, 0, 0); err != nil {
		return err
	}
	text.WriteByte('\n')
	fmt.Fprintf(os.Stderr, "%s: %d cases of %d functions\n", path, len(cases), len(functions))
	return os.WriteFile(path, text.Bytes(), 0o644)
}

// layOut writes JSON so that what fits on a line stands on one. `used` is how much of the line is
// taken by the key before the value.
func layOut(out *bytes.Buffer, value json.RawMessage, depth, used int) error {
	const width, indent = 160, "  "
	if len(value)+used+depth*len(indent) <= width || value[0] != '{' && value[0] != '[' {
		out.Write(value)
		return nil
	}
	newLine := func(depth int) {
		out.WriteByte('\n')
		for range depth {
			out.WriteString(indent)
		}
	}
	decoder := json.NewDecoder(bytes.NewReader(value))
	if _, err := decoder.Token(); err != nil {
		return err
	}
	out.WriteByte(value[0])
	for first := true; decoder.More(); first = false {
		if !first {
			out.WriteByte(',')
		}
		newLine(depth + 1)
		used := 1 // the comma behind the value
		if value[0] == '{' {
			key, err := decoder.Token()
			if err != nil {
				return err
			}
			text, err := json.Marshal(key)
			if err != nil {
				return err
			}
			out.Write(text)
			out.WriteString(": ")
			used += len(text) + 2
		}
		var child json.RawMessage
		if err := decoder.Decode(&child); err != nil {
			return err
		}
		if err := layOut(out, child, depth+1, used); err != nil {
			return err
		}
	}
	newLine(depth)
	out.WriteByte(value[len(value)-1])
	return nil
}

// output runs a command and returns what it prints; if it fails, the error has what it complains
// about.
func output(name string, arguments ...string) ([]byte, error) {
	text, err := exec.Command(name, arguments...).Output()
	var failed *exec.ExitError
	if errors.As(err, &failed) {
		return nil, fmt.Errorf("%s %s: %w\n%s", name, arguments[0], err, failed.Stderr)
	}
	return text, err
}
