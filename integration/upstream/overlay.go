// How our calls get into upstream's tests: an overlay for the Go command, in which upstream's
// package stands in a directory of this module beside a file of ours. The copies with our calls in
// them are made from the module at hand, live in a scratch directory and are deleted at the end.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// An insertion is a call that is put into a function of upstream's.
type insertion struct {
	// The file and the function in it.
	file, function string
	// Where in the function, and what.
	place func(*token.FileSet, *ast.FuncDecl) (token.Pos, string, error)
}

// endpointInsertions record what each case of the table of CategorizeEndpoints is given and what
// it expects. The call does not compile where upstream changed the table's fields.
var endpointInsertions = []insertion{
	{"topology_test.go", "TestCategorizeEndpoints", atEndOfSubtest(`recordCategorization(
		t, %s, tc.nodeName, tc.nodeLabels, tc.preferSameEnabled, tc.serviceInfo, tc.endpoints,
		tc.clusterEndpoints, tc.localEndpoints, expectedAllEndpoints, expectedHasAnyEndpoints)`)},
}

// flowInsertions record the objects that upstream's proxy is given, and the packets whose way
// through its ruleset upstream's tests check.
var flowInsertions = []insertion{
	{"proxier.go", "OnServiceUpdate", atStart("observeService(%s, %s, %s)")},
	{"proxier.go", "OnEndpointSliceAdd", atStart("observeSlice(%s, %s, true)")},
	{"proxier.go", "OnEndpointSliceUpdate", atStart("observeSlice(%s, %[3]s, true)")},
	{"proxier.go", "OnEndpointSliceDelete", atStart("observeSlice(%s, %s, false)")},
	{"proxier_test.go", "NewFakeProxier", beforeReturn("observeProxier(%s, %s)")},
	{"helpers_test.go", "runPacketFlowTests", atStart("recordFlows(%s, %s, %s, %s, %s)")},
}

// atStart puts a call at the start of the function. The call's verbs are the names of the receiver
// and of the parameters.
func atStart(call string) func(*token.FileSet, *ast.FuncDecl) (token.Pos, string, error) {
	return func(_ *token.FileSet, function *ast.FuncDecl) (token.Pos, string, error) {
		var names []any
		for _, list := range []*ast.FieldList{function.Recv, function.Type.Params} {
			if list == nil {
				continue
			}
			for _, field := range list.List {
				for _, name := range field.Names {
					names = append(names, name.Name)
				}
			}
		}
		return function.Body.Lbrace + 1, fmt.Sprintf(call, names...), nil
	}
}

// beforeReturn puts a call before the last statement. The call's verbs are what is returned.
func beforeReturn(call string) func(*token.FileSet, *ast.FuncDecl) (token.Pos, string, error) {
	return func(_ *token.FileSet, function *ast.FuncDecl) (token.Pos, string, error) {
		last := function.Body.List[len(function.Body.List)-1]
		result, ok := last.(*ast.ReturnStmt)
		if !ok {
			return 0, "", errors.New("it does not end with a return")
		}
		var names []any
		for _, value := range result.Results {
			name, ok := value.(*ast.Ident)
			if !ok {
				return 0, "", errors.New("it returns something without a name")
			}
			names = append(names, name.Name)
		}
		return result.Pos(), fmt.Sprintf(call, names...), nil
	}
}

// atEndOfSubtest puts a call at the end of the function that t.Run is given. The call's verb is a
// list of the lines at which the cases of the function's first table stand.
func atEndOfSubtest(call string) func(*token.FileSet, *ast.FuncDecl) (token.Pos, string, error) {
	return func(files *token.FileSet, function *ast.FuncDecl) (token.Pos, string, error) {
		var subtest *ast.FuncLit
		var lines []string
		ast.Inspect(function, func(node ast.Node) bool {
			switch node := node.(type) {
			case *ast.CallExpr:
				name, isSelector := node.Fun.(*ast.SelectorExpr)
				if isSelector && name.Sel.Name == "Run" && len(node.Args) == 2 {
					subtest, _ = node.Args[1].(*ast.FuncLit)
				}
			case *ast.CompositeLit:
				if lines == nil {
					lines = caseLines(files, node)
				}
			}
			return true
		})
		if subtest == nil || lines == nil {
			return 0, "", errors.New("it has no table of subtests")
		}
		list := "[]int{" + strings.Join(lines, ", ") + "}"
		return subtest.Body.Rbrace, fmt.Sprintf(call, list), nil
	}
}

// caseLines returns the lines at which the first fields of a table's cases stand.
func caseLines(files *token.FileSet, table *ast.CompositeLit) []string {
	var lines []string
	for _, element := range table.Elts {
		if fields, ok := element.(*ast.CompositeLit); ok && len(fields.Elts) > 0 {
			line := files.Position(fields.Elts[0].Pos()).Line
			lines = append(lines, strconv.Itoa(line))
		}
	}
	return lines
}

// overlay writes the overlay of a source and returns its path.
func (source source) overlay(module, scratch string) (string, error) {
	ours, err := filepath.Abs(source.ours)
	if err != nil {
		return "", err
	}
	theirs := filepath.Join(module, filepath.FromSlash(source.theirs))
	files, err := filepath.Glob(filepath.Join(theirs, "*.go"))
	if err != nil {
		return "", err
	}
	replace := map[string]string{}
	for _, file := range files {
		name := filepath.Base(file)
		if _, err := os.Stat(filepath.Join(ours, name)); err == nil {
			return "", fmt.Errorf("upstream has a file called %s, too", name)
		}
		replace[filepath.Join(ours, name)] = file
	}
	edits := map[string][]insertion{}
	for _, insertion := range source.insertions {
		edits[insertion.file] = append(edits[insertion.file], insertion)
	}
	for name, insertions := range edits {
		edited, err := insert(filepath.Join(theirs, name), insertions)
		if err != nil {
			return "", fmt.Errorf("%s: %w", name, err)
		}
		copied := filepath.Join(scratch, source.ours+"-"+name)
		if err := os.WriteFile(copied, edited, 0o600); err != nil {
			return "", err
		}
		replace[filepath.Join(ours, name)] = copied
	}
	text, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		return "", err
	}
	path := filepath.Join(scratch, source.ours+".json")
	return path, os.WriteFile(path, text, 0o600)
}

// insert returns a file with calls inserted. No line of it moves.
func insert(file string, insertions []insertion) ([]byte, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	files := token.NewFileSet()
	tree, err := parser.ParseFile(files, file, text, parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	functions := map[string]*ast.FuncDecl{}
	for _, declaration := range tree.Decls {
		if function, ok := declaration.(*ast.FuncDecl); ok {
			functions[function.Name.Name] = function
		}
	}
	calls := map[int]string{}
	for _, insertion := range insertions {
		function := functions[insertion.function]
		if function == nil {
			return nil, fmt.Errorf("there is no function %s", insertion.function)
		}
		position, call, err := insertion.place(files, function)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", insertion.function, err)
		}
		calls[files.Position(position).Offset] = strings.Join(strings.Fields(call), " ")
	}
	var out bytes.Buffer
	for offset, char := range text {
		if call, ok := calls[offset]; ok {
			fmt.Fprintf(&out, " %s; ", call)
		}
		out.WriteByte(char)
	}
	return out.Bytes(), nil
}
